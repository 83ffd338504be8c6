"""A server that requires signatures loads what the key's owner signed, and nothing else."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from convoy.server.assembly import verdict_records
from convoy.server.errors import StartupError, VerificationError
from convoy.server.models.canary import Verdict, VerdictRecords
from convoy.server.models.signing import read_public_key, verify_signature
from convoy.server.settings import parse_settings
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


def test_a_version_without_a_signature_is_rejected(publish, key):
    with pytest.raises(VerificationError, match=r"'colors' version 1: manifest\.sig: .*required"):
        verify(publish(), key.public_key())


def test_another_key_is_rejected(signed):
    stranger = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(VerificationError, match="by another key"):
        verify(signed, stranger)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_one_changed_byte_is_rejected(signed, key, name):
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(VerificationError, match="other bytes"):
        verify(signed, key.public_key())


def test_a_truncated_signature_is_rejected(signed, key):
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


def private_pem(key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b"not a key", "expected an Ed25519 private key as a PEM file"),
        (pem(Ed25519PrivateKey.generate()), "expected an Ed25519 private key as a PEM file"),
        (private_pem(X25519PrivateKey.generate()), "expected an Ed25519 key, got X25519PrivateKey"),
    ],
)
def test_a_file_that_holds_no_key_for_records_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "key.pem"
    if content:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=f"--record-key: .*{complaint}") as caught:
        verdict_records(parse_settings(["--repository", "models", "--record-key", str(path)]))
    assert "\n" not in str(caught.value)


def test_where_signatures_are_required_no_record_is_kept_without_a_key(
    publish, key, key_file, tmp_path, capsys
):
    folder = publish()
    required = ["--repository", str(folder.parents[1]), "--require-signature", str(key_file)]
    state = ["--state-dir", str(tmp_path / "state")]
    with pytest.raises(StartupError, match="--state-dir: with --require-signature, expected --rec"):
        verdict_records(parse_settings([*required, *state]))
    assert verdict_records(parse_settings([*required, "--canary-share", "0.1"])) is None
    assert "canary verdicts are not recorded" in capsys.readouterr().out
    (tmp_path / "record.pem").write_bytes(private_pem(key))
    with_key = [*required, "--record-key", str(tmp_path / "record.pem")]
    for flags in (with_key, [*with_key, *state]):
        records = verdict_records(parse_settings(flags))
        assert records is not None
        records.record(folder, Verdict.ERRORS)
        assert records.find(folder) is Verdict.ERRORS
        assert VerdictRecords(key=Ed25519PrivateKey.generate()).find(folder) is None


def test_the_server_starts_with_signed_versions_only(signed, publish, key_file):
    models = signed.parent.parent
    publish(2)
    flags = ["--device", "cpu", "--require-signature", key_file]
    with running_server(models, *flags) as server:
        (rejected,) = [event for event in server.events if event["event"] == "version rejected"]
        assert (rejected["version"], rejected["reason"]) == (2, "signature")
        assert server.stop() == 0
    (signed / "manifest.sig").unlink()
    ports = ["--port", "0", "--metrics-port", "0"]
    ended = run_module("convoy.server", "--repository", models, *ports, *flags, "--exit-on-error")
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("convoy-server: model 'colors' version 2: manifest.sig: ")
