"""What can be done with published versions: verify, show, diff, sign, promote, roll back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from convoy.export.__main__ import main
from convoy.export.errors import InputError, ParityError
from convoy.export.formats import ArtifactFormat, Variant
from convoy.export.pipeline import ExportOptions, Published, export
from convoy.export.repository import ModelFolder, promote, rollback
from convoy.export.samples import Samples
from convoy.export.signing import check_signature
from convoy.export.source import ModelSource
from convoy.export.versions import compare, golden_expectation, read_version, verify
from convoy.server.models.canary import Verdict, VerdictRecords
from convoy.training import nets
from tests.export.conftest import PORTABLE_FORMATS, perturb_batch_norms
from tests.needs import needs_program


@pytest.fixture
def version(published: Published, tmp_path: Path) -> Path:
    """A copy of a published version that a test may damage."""
    copy = tmp_path / "models" / "digits" / "1"
    shutil.copytree(published.path, copy)
    for file in copy.iterdir():
        file.chmod(0o644)
    return copy


@pytest.fixture(scope="module")
def other(
    source: ModelSource, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    """A version of a net with other weights."""
    net = nets.create(source.architecture, **source.architecture_arguments).eval()
    perturb_batch_norms(net)
    changed = ModelSource(
        net, source.data, 1.0, "0" * 64, source.architecture, source.architecture_arguments, {}
    )
    target = ModelFolder(tmp_path_factory.mktemp("other"), "digits")
    return export(changed, samples, target, ExportOptions([Variant(ArtifactFormat.TORCHSCRIPT)]))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convoy-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_verify_accepts_what_was_published(version: Path) -> None:
    found = read_version(version)
    parities = verify(found, golden_expectation(found))
    assert {variant.format for variant in parities} == set(PORTABLE_FORMATS)
    assert all(parity.samples == 16 for parity in parities.values())
    assert all(parity.max_logit_difference < 1e-4 for parity in parities.values())


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.torchscript", "model.pt2", "samples.npz", "report.png"]
)
def test_one_changed_byte_is_noticed(version: Path, name: str) -> None:
    content = bytearray((version / name).read_bytes())
    content[len(content) // 2] ^= 1
    (version / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: expected SHA-256"):
        read_version(version)


def test_an_artifact_of_another_net_fails_though_its_digest_is_right(
    version: Path, other: Published
) -> None:
    shutil.copy(other.path / "model.torchscript", version / "model.torchscript")
    manifest = json.loads((version / "manifest.json").read_text())
    foreign = json.loads((other.path / "manifest.json").read_text())
    for artifact in manifest["artefacts"]:
        if artifact["format"] == "ARTEFACT_FORMAT_TORCHSCRIPT":
            artifact["file"] = foreign["artefacts"][0]["file"]
    (version / "manifest.json").write_text(json.dumps(manifest))
    found = read_version(version)
    with pytest.raises(ParityError, match=r"model.torchscript, batch size 1, golden sample \d+"):
        verify(found, golden_expectation(found))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema_version": 99}, "schema_version: expected 1, got 99"),
        ({"surprise": True}, "surprise"),
        ({"samples": {"file": {"name": "../samples.npz"}}}, "plain file"),
    ],
)
def test_a_manifest_of_another_kind_is_rejected(
    version: Path, change: dict[str, object], complaint: str
) -> None:
    manifest = json.loads((version / "manifest.json").read_text()) | change
    (version / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=complaint):
        read_version(version)


def test_a_link_in_place_of_a_file_must_not_leave_the_repository(version: Path) -> None:
    model, outside = version / "model.onnx", version.parents[2] / "outside.onnx"
    model.rename(version / "..data.onnx")
    model.symlink_to("..data.onnx")
    read_version(version)
    (version / "..data.onnx").rename(outside)
    model.unlink()
    model.symlink_to(outside)
    with pytest.raises(InputError, match=r"model\.onnx: expected a file of the repository"):
        read_version(version)


def test_the_commands_verify_and_show(
    version: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "verify", version) == 0
    assert "16 samples" in capsys.readouterr().out
    assert run(monkeypatch, "verify", version, "--checkpoint", tiny_checkpoint) == 0
    assert "277 samples" in capsys.readouterr().out
    assert run(monkeypatch, "show", version) == 0
    assert "multiply-adds" in capsys.readouterr().out
    (version / "samples.npz").unlink()
    assert run(monkeypatch, "show", version) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_show_reads_what_a_server_recorded_about_the_canary(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def shown(*flags: object) -> str:
        assert run(monkeypatch, "show", version, *flags) == 0
        return " ".join(capsys.readouterr().out.split())

    monkeypatch.setenv("COLUMNS", "200")
    assert "canary" not in shown()
    VerdictRecords().record(version, Verdict.ERRORS)
    assert "rolled back: errors" in shown()
    assert "not signed" in shown()
    key = Ed25519PrivateKey.generate()
    VerdictRecords(tmp_path / "state", key).record(version, Verdict.GOOD)
    state = shown("--state-dir", tmp_path / "state")
    assert "passed" in state
    assert "not signed" not in state
    record = version.with_name(f"{version.name}.canary.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"manifest_sha256": "0" * 64}))
    assert "servers ignore it" in shown()
    record.write_text("{")
    assert run(monkeypatch, "show", version) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_verify_rejects_another_checkpoint(
    other: Published,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "verify", other.path, "--checkpoint", tiny_checkpoint) == 2
    assert "checkpoint: expected SHA-256 000000000000" in capsys.readouterr().err


def test_a_version_compared_with_itself_has_not_changed(
    published: Published, samples: Samples
) -> None:
    version = read_version(published.path)
    comparison = compare(version, version, samples.validation)
    assert comparison.changes == ()
    assert comparison.agreement == 1
    assert comparison.size_bytes[0] == (published.path / "model.onnx").stat().st_size


def test_diff_counts_and_names_the_changed_samples(
    published: Published,
    other: Published,
    samples: Samples,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = samples.validation
    before, after = read_version(published.path), read_version(other.path)
    shared = Variant(ArtifactFormat.TORCHSCRIPT)
    old, new = (found.load(shared)(real.images).logits.argmax(1) for found in (before, after))
    comparison = compare(before, after, real)
    assert comparison.variant == shared
    assert [change.index for change in comparison.changes] == list((old != new).nonzero()[0])
    assert comparison.accuracy == ((old == real.labels).mean(), (new == real.labels).mean())
    assert run(monkeypatch, "diff", published.path, other.path) == 0
    assert f"of {len(real)}" in capsys.readouterr().out


@pytest.fixture
def key_files(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key as PEM files."""
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def test_a_signed_version_verifies_until_its_manifest_changes(
    tiny_checkpoint: Path,
    key_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    private, public = key_files
    arguments = [tiny_checkpoint, "--repository", tmp_path, "--name", "signed"]
    only = ["--format", "torchscript"]
    assert run(monkeypatch, *arguments, *only, "--sign-key", private) == 0
    version = tmp_path / "signed" / "1"
    assert len((version / "manifest.sig").read_bytes()) == 64
    assert run(monkeypatch, "verify", version, "--public-key", public) == 0
    manifest = version / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes().replace(b'"signed"', b'"forged"'))
    assert run(monkeypatch, "verify", version, "--public-key", public) == 2
    assert "manifest.sig" in capsys.readouterr().err


@needs_program("openssl", "openssl")
def test_openssl_accepts_the_signature(
    key_files: tuple[Path, Path], version: Path, tmp_path: Path
) -> None:
    from convoy.export.signing import read_private_key, sign

    sign(version, read_private_key(key_files[0]))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(key_files[1])]
    files = ["-in", str(version / "manifest.json"), "-sigfile", str(version / "manifest.sig")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unsigned_version_fails_where_a_signature_is_demanded(version: Path) -> None:
    with pytest.raises(InputError, match=r"manifest.sig: No such file"):
        check_signature(version, Ed25519PrivateKey.generate().public_key())


def test_a_key_of_another_kind_is_rejected(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pem = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "ec.pem").write_bytes(pem)
    arguments = [tiny_checkpoint, "--name", "digits", "--repository", tmp_path / "models"]
    assert run(monkeypatch, *arguments, "--sign-key", tmp_path / "ec.pem") == 2
    assert "expected Ed25519" in capsys.readouterr().err


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    """A model with versions 1, 2 and 3."""
    for version in ("1", "2", "3"):
        (tmp_path / "digits" / version).mkdir(parents=True)
    return ModelFolder(tmp_path, "digits")


def test_promotions_are_taken_back_one_by_one(model: ModelFolder) -> None:
    assert model.read_policy() is None
    for version in (1, 3, 2):
        promote(model, version)
    assert [rollback(model).version for _ in range(2)] == [3, 1]
    with pytest.raises(InputError, match="expected an earlier promotion"):
        rollback(model)
    stored = json.loads((model.path / "policy.json").read_text())
    assert stored == {"schema_version": 1, "version": 1}
    assert sorted(path.name for path in model.path.iterdir()) == ["1", "2", "3", "policy.json"]


def test_only_an_existing_version_is_promoted(model: ModelFolder) -> None:
    with pytest.raises(InputError, match=r"expected one of its versions \(1, 2, 3\), got 4"):
        promote(model, 4)
    assert model.read_policy() is None


def test_the_commands_promote_and_roll_back(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--repository", model.repository]
    assert run(monkeypatch, "promote", "digits", 2, *at) == 0
    assert run(monkeypatch, "promote", "digits", 3, *at) == 0
    assert run(monkeypatch, "rollback", "digits", *at) == 0
    assert "servers will serve version 2 again" in capsys.readouterr().out
    assert run(monkeypatch, "promote", "digits", 9, *at) == 2
    assert run(monkeypatch, "rollback", "letters", *at) == 2
    assert "letters" in capsys.readouterr().err
