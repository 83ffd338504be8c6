"""What convoy-export signs is what a server that requires signatures loads."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from convoy.server.models.signing import read_public_key, verify_signature
from tests.processes import run_module


def test_the_server_accepts_the_exporters_signature(checkpoint, tmp_path):
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    flags = ["--repository", tmp_path, "--name", "digits", "--format", "torchscript"]
    done = run_module("convoy.export", checkpoint, *flags, "--sign-key", private)
    assert done.returncode == 0, done.stderr
    version = tmp_path / "digits" / "1"
    verify_signature(version, (version / "manifest.json").read_bytes(), read_public_key(public))
