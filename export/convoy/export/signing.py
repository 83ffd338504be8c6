"""Ed25519 signatures of manifests (RFC 8032), by the `cryptography` library.

The manifest has the SHA-256 of every other file, so its signature covers the whole version. The
signature, 64 raw bytes over the exact bytes of manifest.json, is in manifest.sig.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from convoy.export.errors import InputError, one_line
from convoy.export.repository import MANIFEST_NAME

SIGNATURE_NAME = "manifest.sig"


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read an unencrypted PEM file, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        InputError: The file is unreadable or has another kind of key.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"signing key {path}: {one_line(error)}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"signing key {path}: expected Ed25519, got {type(key).__name__}")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a PEM file, as `openssl pkey -pubout` writes it.

    Raises:
        InputError: The file is unreadable or has another kind of key.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"public key {path}: {one_line(error)}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"public key {path}: expected Ed25519, got {type(key).__name__}")
    return key


def sign(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write the signature of the manifest in a folder."""
    (folder / SIGNATURE_NAME).write_bytes(key.sign((folder / MANIFEST_NAME).read_bytes()))


def check_signature(folder: Path, key: Ed25519PublicKey) -> None:
    """Check that the manifest in a folder was signed with the private half of a key.

    Raises:
        InputError: The signature is missing, or does not match the key and the bytes.
    """
    try:
        signature = (folder / SIGNATURE_NAME).read_bytes()
        key.verify(signature, (folder / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise InputError(f"version {folder}: {SIGNATURE_NAME}: {error.strerror}") from error
    except InvalidSignature as error:
        raise InputError(
            f"version {folder}: {SIGNATURE_NAME}: expected a signature of the manifest by the "
            "given key, got one of other bytes or by another key"
        ) from error
