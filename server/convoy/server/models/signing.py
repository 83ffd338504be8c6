"""Ed25519 signatures (RFC 8032) of manifests, and of the server's own records.

`--require-signature` makes them mandatory. The export signs the exact bytes of manifest.json and
writes the 64 bytes of the signature to manifest.sig. The manifest holds the SHA-256 of every file,
so the signature covers the version. The server signs the verdicts of canaries.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from convoy.server.errors import SignatureError, StartupError
from convoy.server.models.manifest import MANIFEST_NAME
from convoy.server.models.repository import open_regular, read_error, repository_of
from convoy.v1 import model_manifest_pb2 as pb

SIGNATURE_NAME = "manifest.sig"
_SIGNATURE_BYTES = 64


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a PEM file, as `openssl pkey -pubout` writes it.

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


def read_record_key(path: Path) -> Ed25519PrivateKey:
    """Read an unencrypted PEM file, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        StartupError: The file is unreadable or holds another kind of key.
    """
    where = f"--record-key: {str(path)!r}"
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise StartupError(f"{where}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StartupError(f"{where}: expected an Ed25519 private key as a PEM file") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise StartupError(f"{where}: expected an Ed25519 key, got {type(key).__name__}")
    return key


def sign_record(record: pb.CanaryRecord, model: str, version: int, key: Ed25519PrivateKey) -> None:
    """Sign the verdict on a version."""
    record.signature = key.sign(_signed_text(record, model, version))


def verify_record(record: pb.CanaryRecord, model: str, version: int, key: Ed25519PublicKey) -> None:
    """Check that the verdict on a version was signed with the private half of a key.

    Raises:
        SignatureError: It is unsigned, signed by another key, or the verdict was changed.
    """
    try:
        key.verify(record.signature, _signed_text(record, model, version))
    except InvalidSignature as error:
        raise SignatureError("expected a signature by --record-key") from error


def _signed_text(record: pb.CanaryRecord, model: str, version: int) -> bytes:
    lines = ("convoy canary 1", model, version, record.manifest_sha256, record.verdict)
    return "".join(f"{line}\n" for line in (*lines, record.decided_at)).encode()


def verify_signature(version_folder: Path, manifest: bytes, public_key: Ed25519PublicKey) -> None:
    """Check that the manifest of a version was signed with the private half of a key.

    Args:
        version_folder: NAME/VERSION, which holds manifest.sig.
        manifest: The bytes of manifest.json that were read.
        public_key: The key of the required signature.

    Raises:
        SignatureError: There is no signature, or it belongs to another key or other bytes.
    """
    where = f"model {version_folder.parent.name!r} version {version_folder.name}"
    try:
        root = repository_of(version_folder)
        with open_regular(version_folder / SIGNATURE_NAME, root) as file:
            signature = file.read(_SIGNATURE_BYTES + 1)
        public_key.verify(signature, manifest)
    except OSError as error:
        missing = f"{where}: {SIGNATURE_NAME}: a signature is required"
        raise read_error(SignatureError, missing, error) from error
    except InvalidSignature as error:
        raise SignatureError(
            f"{where}: {SIGNATURE_NAME}: expected a signature of {MANIFEST_NAME} by the required "
            "key, got one of other bytes or by another key"
        ) from error
