import json
import os
from pathlib import Path

import pytest

from server.errors import ManifestError, RepositoryError, VerificationError
from server.manifest import ArtefactFormat, read_manifest
from server.policy import Promotion
from server.repository import ModelFolder, ModelRepository, ModelVersion, fingerprint
from tests.server.conftest import describe, file_record, seal


def test_models_and_versions_are_found(publish, tmp_path):
    for version in (2, 1, 10):
        publish(version)
    publish(3, name="shades")
    found = ModelRepository(tmp_path / "models").models()
    assert [(folder.name, folder.versions) for folder in found] == [
        ("colours", (1, 2, 10)),
        ("shades", (3,)),
    ]


def test_what_is_no_published_version_is_left_alone(publish, tmp_path):
    models = tmp_path / "models"
    publish(1)
    (models / "colours" / "2").mkdir()  # no manifest
    (models / "colours" / ".3.x7f.partial").mkdir()
    (models / "colours" / "latest").symlink_to("1")
    (models / "colours" / "4").symlink_to("1")
    (models / "colours" / "05").mkdir()
    (models / "README.md").write_text("notes")
    (models / "elsewhere").symlink_to(models / "colours")
    (found,) = ModelRepository(models).models()
    assert (found.name, found.versions) == ("colours", (1,))


def test_an_empty_or_missing_repository_is_an_error(tmp_path: Path):
    with pytest.raises(RepositoryError, match="holds no model"):
        ModelRepository(tmp_path).models()
    with pytest.raises(RepositoryError, match="expected a folder"):
        ModelRepository(tmp_path / "nowhere").models()


def test_a_file_is_compared_with_the_manifest(publish, tmp_path):
    folder = publish()
    version = ModelVersion(folder, read_manifest(folder))
    record = version.manifest.artefact(ArtefactFormat.ONNX).file
    assert version.read(record).content == (folder / "model.onnx").read_bytes()
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(VerificationError, match=r"model\.onnx: expected SHA-256"):
        version.read(record)
    (folder / "model.onnx").write_bytes(content + b"more")
    with pytest.raises(VerificationError, match=r"model\.onnx: expected \d+ bytes, got \d+"):
        version.read(record)


def test_a_link_in_the_place_of_a_file_is_refused(publish, tmp_path):
    folder = publish()
    version = ModelVersion(folder, read_manifest(folder))
    (folder / "model.onnx").rename(tmp_path / "outside.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    record = version.manifest.artefact(ArtefactFormat.ONNX).file
    with pytest.raises(VerificationError, match="expected a plain file, got a link"):
        version.read(record)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(VerificationError, match=r"model\.onnx: expected a plain file$"):
        version.read(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version: expected 1, got 2"),
        ({"colour_space": "BGR"}, "colour_space"),
        ({"name": "shades"}, "describes model 'shades' version 1"),
        ({"version": 7}, "describes model 'colours' version 7"),
        ({"labels": ["red", "green"]}, r"expected \[-1, 2\] for as many labels, got \[-1, 3\]"),
        ({"outputs": []}, "outputs|argument"),
        (
            {"input": {"name": "image", "datatype": "FP32", "shape": [-1, 4, 6, 3]}},
            r"input: expected UINT8 \[-1, 4, 6, 3\].*got FP32",
        ),
        (
            {"preprocessing": {"height_px": 4, "width_px": 6, "resize_shorter_px": 3}},
            "resize_shorter_px: expected 0 or at least the crop's larger side, got 3",
        ),
        ({"preprocessing": {}}, "expected height_px and width_px above 0"),
        (
            {"samples": {"file": {"name": "../../secret"}}},
            "file name: expected a plain name without folders",
        ),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(publish, changes, message):
    folder = publish()
    seal(folder, **changes)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"version": "x"}'])
def test_a_damaged_manifest_is_one_line(publish, content):
    folder = publish()
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match="model 'colours' version 1") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_artefact_is_named(publish):
    manifest = read_manifest(publish())
    with pytest.raises(ManifestError, match=r"expected .*'torchscript' in fp32, found onnx fp32$"):
        manifest.artefact(ArtefactFormat.TORCHSCRIPT)
    with pytest.raises(ManifestError, match=r"'onnx' in int8, found onnx fp32$"):
        manifest.artefact(ArtefactFormat.ONNX, "int8")


def test_the_manifest_of_a_version_reads_as_written(publish):
    folder = publish()
    manifest = read_manifest(folder)
    written = json.loads((folder / "manifest.json").read_text())
    assert manifest.labels == tuple(written["labels"])
    assert manifest.sample_shape == (4, 6, 3)
    assert manifest.artefact(ArtefactFormat.ONNX).tolerance == 1e-4


def test_a_link_in_the_place_of_the_manifest_is_refused(publish, tmp_path):
    folder = publish()
    (folder / "manifest.json").rename(tmp_path / "outside.json")
    (folder / "manifest.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(folder)


def test_every_file_is_compared_not_only_those_that_are_loaded(publish):
    folder = publish()
    (folder / "model.torchscript").write_bytes(b"weights")
    artefacts = [
        *describe(folder)["artefacts"],
        {
            "format": "ARTEFACT_FORMAT_TORCHSCRIPT",
            "file": file_record(folder / "model.torchscript"),
        },
    ]
    seal(folder, artefacts=artefacts)
    version = ModelVersion(folder, read_manifest(folder))
    wanted = version.manifest.artefact(ArtefactFormat.ONNX).file
    (file,) = version.read_files(wanted)
    assert file.name == "model.onnx"
    (folder / "model.torchscript").write_bytes(b"Weights")
    with pytest.raises(VerificationError, match=r"model\.torchscript: expected SHA-256"):
        version.read_files(wanted)


def test_a_fingerprint_changes_with_any_file(publish):
    folder = publish()
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    (folder / "manifest.sig").write_bytes(b"signature")
    seen.append(fingerprint(folder))
    (folder / "manifest.sig").write_bytes(b"Signature")
    seen.append(fingerprint(folder))
    (folder / "manifest.sig").unlink()
    (folder / "samples.npz").rename(folder / "other.npz")
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 4
    assert fingerprint(folder.parent / "9") == ()


def test_the_policy_file_is_read(publish):
    for version in (1, 2, 3):
        folder = publish(version)
    policy = folder.parent / "policy.json"
    policy.write_text(json.dumps({"schema_version": 1, "version": 2, "previous": [1]}))
    found = ModelFolder(folder.parent, (1, 2, 3)).promotion()
    assert found == Promotion(2, (1,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "version": 9}', "names version 9, found 1"),
        ('{"schema_version": 2, "version": 1}', "schema_version: expected 1, got 2"),
        ("{", r"policy\.json"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_an_error(publish, content, message):
    model = publish().parent
    (model / "policy.json").write_text(content)
    with pytest.raises(RepositoryError, match=message) as caught:
        ModelFolder(model, (1,)).promotion()
    assert "\n" not in str(caught.value)


def test_indexing_many_versions_lists_folders_and_opens_no_file(publish, monkeypatch):
    """200 models with 5 versions each: 201 listings and one look for a manifest a version."""
    root = publish().parent.parent
    for model in range(200):
        for version in range(1, 6):
            folder = root / f"model-{model}" / str(version)
            folder.mkdir(parents=True)
            (folder / "manifest.json").touch()
    listed = []
    scandir = os.scandir

    def count(path):
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", count)
    for name in ("builtins.open", "io.open", "os.open"):
        monkeypatch.setattr(name, None)
    found = ModelRepository(root).models()
    monkeypatch.undo()
    assert sum(len(folder.versions) for folder in found) == 1001
    assert len(listed) == 202
