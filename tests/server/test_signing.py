"""A server that requires signatures loads what the key's owner signed, and nothing else."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.errors import StartupError, VerificationError
from server.signing import read_public_key, verify_signature
from tests.processes import run_module, running_server


def pem(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def key_file(key, tmp_path):
    path = tmp_path / "public.pem"
    path.write_bytes(pem(key))
    return path


@pytest.fixture
def signed(publish, key):
    folder = publish()
    (folder / "manifest.sig").write_bytes(key.sign((folder / "manifest.json").read_bytes()))
    return folder


def verify(folder, key) -> None:
    verify_signature(folder, (folder / "manifest.json").read_bytes(), key)


def test_a_signed_version_passes(signed, key_file):
    verify(signed, read_public_key(key_file))


def test_a_version_without_a_signature_is_refused(publish, key):
    with pytest.raises(VerificationError, match=r"'colours' version 1: manifest\.sig: .*required"):
        verify(publish(), key.public_key())


def test_another_key_is_refused(signed):
    stranger = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(VerificationError, match="by another key"):
        verify(signed, stranger)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_one_changed_byte_is_refused(signed, key, name):
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(VerificationError, match="other bytes"):
        verify(signed, key.public_key())


def test_a_cut_signature_is_refused(signed, key):
    (signed / "manifest.sig").write_bytes(b"")
    with pytest.raises(VerificationError):
        verify(signed, key.public_key())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b"not a key", "expected an Ed25519 public key as a PEM file"),
        (pem(X25519PrivateKey.generate()), "expected an Ed25519 key, got X25519PublicKey"),
    ],
)
def test_a_file_that_holds_no_such_key_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "key.pem"
    if content:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=f"--require-signature: .*{complaint}") as caught:
        read_public_key(path)
    assert "\n" not in str(caught.value)


def test_the_server_starts_with_signed_versions_only(signed, publish, key_file):
    models = signed.parent.parent
    publish(2)
    flags = ["--device", "cpu", "--require-signature", key_file]
    with running_server(models, *flags) as server:
        (refused,) = [event for event in server.events if event["event"] == "version refused"]
        assert (refused["version"], refused["reason"]) == (2, "signature")
        assert server.stop() == 0
    (signed / "manifest.sig").unlink()
    ports = ["--port", "0", "--http-port", "0"]
    ended = run_module("server", "--repository", models, *ports, *flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith("convoy-server: model 'colours' version 2: manifest.sig: ")
    assert ended.stderr.count("\n") == 1
