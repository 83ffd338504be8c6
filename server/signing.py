"""Ed25519 signatures of manifests (RFC 8032), which a server can be told to require.

`export` writes 64 raw bytes over the exact bytes of manifest.json into manifest.sig beside it. The
manifest holds the SHA-256 of every file that is loaded, so its signature covers the whole version.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from server.errors import SignatureError, StartupError
from server.files import open_plain
from server.manifest import MANIFEST_NAME

SIGNATURE_NAME = "manifest.sig"
_SIGNATURE_BYTES = 64


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Reads a PEM file, as `openssl pkey -pubout` writes it.

    Raises:
        StartupError: The file is unreadable or holds another kind of key.
    """
    where = f"--require-signature: {str(path)!r}"
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{where}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise StartupError(f"{where}: expected an Ed25519 public key as a PEM file") from error
    if not isinstance(key, Ed25519PublicKey):
        raise StartupError(f"{where}: expected an Ed25519 key, got {type(key).__name__}")
    return key


def verify_signature(version_folder: Path, manifest: bytes, public_key: Ed25519PublicKey) -> None:
    """Checks that the manifest of a version was signed with the private half of a key.

    Args:
        version_folder: NAME/VERSION, with manifest.sig.
        manifest: The bytes of manifest.json that the version is loaded by.
        public_key: Whose signature is required.

    Raises:
        SignatureError: There is no signature, or it is not of this key and these bytes.
    """
    where = f"model {version_folder.parent.name!r} version {version_folder.name}"
    try:
        with open_plain(version_folder / SIGNATURE_NAME) as file:
            signature = file.read(_SIGNATURE_BYTES + 1)
        public_key.verify(signature, manifest)
    except OSError as error:
        raise SignatureError(
            f"{where}: {SIGNATURE_NAME}: a signature is required: {error.strerror}"
        ) from error
    except InvalidSignature as error:
        raise SignatureError(
            f"{where}: {SIGNATURE_NAME}: expected a signature of {MANIFEST_NAME} by the required "
            "key, got one of other bytes or by another key"
        ) from error
