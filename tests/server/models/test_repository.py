import json
import os
import shutil
from pathlib import Path

import pytest

from convoy.server.errors import ManifestError, RepositoryError, VerificationError
from convoy.server.models.manifest import ArtifactFormat
from convoy.server.models.policy import Promotion
from convoy.server.models.repository import (
    ModelFolder,
    ModelRepository,
    ModelVersion,
    fingerprint,
    read_manifest,
    read_policy,
)
from tests.server.conftest import describe, file_record, mount, seal


def test_models_and_versions_are_found(publish, tmp_path):
    for version in (2, 1, 10):
        publish(version)
    publish(3, name="shades")
    found = ModelRepository(tmp_path / "models").models()
    assert [(folder.name, folder.versions) for folder in found] == [
        ("colors", (1, 2, 10)),
        ("shades", (3,)),
    ]


def test_what_is_no_published_version_is_left_alone(publish, tmp_path):
    models = tmp_path / "models"
    publish(1)
    (models / "colors" / "2").mkdir()  # no manifest
    (models / "colors" / ".3.x7f.partial").mkdir()
    (models / "colors" / "latest").symlink_to("1")
    (models / "colors" / "4").symlink_to("nowhere")
    (models / "colors" / "05").mkdir()
    (models / "README.md").write_text("notes")
    (models / "elsewhere").symlink_to(models / "nowhere")
    (models / "README").symlink_to(models / "README.md")
    (found,) = ModelRepository(models).models()
    assert (found.name, found.versions) == ("colors", (1,))


def test_models_and_versions_may_be_links(publish, tmp_path):
    """As Kubernetes mounts a volume: a link to a folder that is replaced as a whole."""
    models = tmp_path / "models"
    publish(1)
    (models / "..2026_11_29").mkdir()
    (models / "colors").rename(models / "..2026_11_29" / "colors")
    (models / "..data").symlink_to("..2026_11_29")
    (models / "colors").symlink_to("..data/colors")
    (models / "..2026_11_29" / "colors" / "2").symlink_to("1")
    (found,) = ModelRepository(models).models()
    assert (found.name, found.versions) == ("colors", (1, 2))
    version = ModelVersion(found.version(1), read_manifest(found.version(1)))
    assert version.read_files(version.manifest.samples)[0].name == "samples.npz"


def test_a_promotion_of_a_version_that_is_gone_is_named(tmp_path):
    with pytest.raises(RepositoryError, match="names version 9, found 1"):
        ModelFolder(tmp_path, (1,)).check(Promotion(9))


def test_an_empty_or_missing_repository_is_an_error(tmp_path: Path):
    with pytest.raises(RepositoryError, match="holds no model"):
        ModelRepository(tmp_path).models()
    with pytest.raises(RepositoryError, match="expected a folder"):
        ModelRepository(tmp_path / "nowhere").models()


def test_a_file_is_compared_with_the_manifest(publish, tmp_path):
    folder = publish()
    version = ModelVersion(folder, read_manifest(folder))
    record = version.manifest.artifact(ArtifactFormat.ONNX).file
    assert version.read(record).content == (folder / "model.onnx").read_bytes()
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(VerificationError, match=r"model\.onnx: expected SHA-256"):
        version.read(record)
    (folder / "model.onnx").write_bytes(content + b"more")
    with pytest.raises(VerificationError, match=r"model\.onnx: expected \d+ bytes, got \d+"):
        version.read(record)


def test_files_may_be_links_inside_the_repository(publish):
    model = publish().parent
    mount(model / "1", "..2026_11_29")
    (model / "policies").mkdir()
    (model / "policies" / "a.json").write_text('{"schema_version": 1, "version": 1}')
    (model / "policy.json").symlink_to("policies/a.json")
    assert read_policy(model) == Promotion(1)
    version = ModelVersion(model / "1", read_manifest(model / "1"))
    record = version.manifest.artifact(ArtifactFormat.ONNX).file
    content = version.read(record).content
    # One blob may be in two versions.
    (model / "1" / "model.onnx").unlink()
    (model / "2").mkdir()
    (model / "2" / "blob").write_bytes(content)
    (model / "1" / "model.onnx").symlink_to("../2/blob")
    assert version.read(record).content == content


def test_the_files_of_a_version_that_is_a_link_may_be_links_beside_it(publish, tmp_path):
    folder = publish()
    mount(folder, "..2026_11_29")
    (tmp_path / "volume").mkdir()
    folder.rename(tmp_path / "volume" / "1")
    folder.symlink_to(tmp_path / "volume" / "1")
    assert read_manifest(folder).version == 1


def test_a_mounted_version_has_another_fingerprint_when_it_is_replaced(publish):
    folder = publish()
    mount(folder, "..2026_11_29")
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    shutil.copytree(folder / "..2026_11_29", folder / "..2026_11_30")
    (folder / "..next").symlink_to("..2026_11_30")
    (folder / "..next").replace(folder / "..data")
    assert fingerprint(folder) != before


def test_a_link_in_the_place_of_a_file_must_not_leave_the_repository(publish, tmp_path):
    folder = publish()
    version = ModelVersion(folder, read_manifest(folder))
    (folder / "model.onnx").rename(tmp_path / "outside.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    record = version.manifest.artifact(ArtifactFormat.ONNX).file
    with pytest.raises(VerificationError, match="expected a file of the repository, got a link"):
        version.read(record)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(VerificationError, match="symbolic links"):
        version.read(record)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(VerificationError, match=r"model\.onnx: expected a plain file$"):
        version.read(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version: expected 1, got 2"),
        ({"color_space": "BGR"}, "color_space"),
        ({"name": "shades"}, "describes model 'shades' version 1"),
        ({"version": 7}, "describes model 'colors' version 7"),
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
def test_a_manifest_that_cannot_be_trusted_is_rejected(publish, changes, message):
    folder = publish()
    seal(folder, **changes)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"version": "x"}'])
def test_a_damaged_manifest_is_one_line(publish, content):
    folder = publish()
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match="model 'colors' version 1") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_artifact_is_named(publish):
    manifest = read_manifest(publish())
    with pytest.raises(ManifestError, match=r"expected .*'torchscript' in fp32, found onnx fp32$"):
        manifest.artifact(ArtifactFormat.TORCHSCRIPT)
    with pytest.raises(ManifestError, match=r"'onnx' in int8, found onnx fp32$"):
        manifest.artifact(ArtifactFormat.ONNX, "int8")


def test_the_manifest_of_a_version_reads_as_written(publish):
    folder = publish()
    manifest = read_manifest(folder)
    written = json.loads((folder / "manifest.json").read_text())
    assert manifest.labels == tuple(written["labels"])
    assert manifest.sample_shape == (4, 6, 3)
    assert manifest.artifact(ArtifactFormat.ONNX).tolerance == 1e-4


def test_a_link_in_the_place_of_the_manifest_is_rejected(publish, tmp_path):
    folder = publish()
    (folder / "manifest.json").rename(tmp_path / "outside.json")
    (folder / "manifest.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(folder)


def test_every_file_is_compared_not_only_those_that_are_loaded(publish):
    folder = publish()
    (folder / "model.torchscript").write_bytes(b"weights")
    artifacts = [
        *describe(folder)["artefacts"],
        {
            "format": "ARTEFACT_FORMAT_TORCHSCRIPT",
            "file": file_record(folder / "model.torchscript"),
        },
    ]
    seal(folder, artefacts=artifacts)
    version = ModelVersion(folder, read_manifest(folder))
    wanted = version.manifest.artifact(ArtifactFormat.ONNX).file
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
