"""The cache of decoded images: never wrong, never damaged for long, never too large."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.training.data import Cache, load_data
from convoy.training.data import cache as module
from convoy.training.data.cache import file_identity


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def spec(folder: Path) -> str:
    return f"imagefolder:{folder}"


def paint(folder: Path, color: str) -> None:
    """Gives every image of a folder another color, with the sizes and times as they were."""
    for path in folder.rglob("*.png"):
        before = path.stat()
        Image.new("RGB", (8, 8), color).save(path, compress_level=0)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_two_projects_with_equal_relative_names_keep_their_own_pixels(
    image_folder: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(image_folder, "black")
    other = tmp_path / "elsewhere" / "photos"
    shutil.copytree(image_folder, other)
    paint(other, "white")
    for folder, value in ((image_folder, 0), (other, 255)):
        monkeypatch.chdir(folder.parent)
        assert load_data("imagefolder:photos", cache=cache).train.images.max() == value


def test_a_file_with_its_old_size_and_time_is_decoded_anew(
    image_folder: Path, cache: Cache
) -> None:
    paint(image_folder, "black")
    assert load_data(spec(image_folder), cache=cache).train.images.max() == 0
    paint(image_folder, "white")
    assert load_data(spec(image_folder), cache=cache).train.images.min() == 255


def test_another_policy_or_library_decodes_anew(
    image_folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_data(spec(image_folder), cache=cache)
    before = {entry.path for entry in cache.entries()}
    monkeypatch.setattr(module, "decoder_version", lambda: "another")
    load_data(spec(image_folder), cache=cache)
    assert before < {entry.path for entry in cache.entries()}


def test_the_version_of_the_decoder_follows_its_code() -> None:
    text = module.decoder_version()
    assert "pillow" in text
    assert len(text.split(",")[0]) == 64


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_truncated_or_empty_entry_is_replaced(
    keep: int, image_folder: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_data(spec(image_folder), cache=cache)
    sizes = {entry.path: entry.size_bytes for entry in cache.entries()}
    for path in sizes:
        path.write_bytes(path.read_bytes()[:keep])
    again = load_data(spec(image_folder), cache=cache)
    np.testing.assert_array_equal(again.train.images, first.train.images)
    assert "is damaged" in caplog.text
    assert {entry.path: entry.size_bytes for entry in cache.entries()} == sizes


def test_a_flipped_byte_is_noticed(
    image_folder: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_data(spec(image_folder), cache=cache)
    for entry in cache.entries():
        content = bytearray(entry.path.read_bytes())
        content[len(content) // 3] ^= 1
        entry.path.write_bytes(content)
    again = load_data(spec(image_folder), cache=cache)
    np.testing.assert_array_equal(again.train.images, first.train.images)
    assert "is damaged" in caplog.text


def test_the_least_recently_used_entry_is_deleted_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2500)
    paths = [cache.entry(number, suffix="npz") for number in range(3)]
    for age, path in zip((30, 20, 10), paths, strict=True):
        assert cache.store(path, lambda file: file.write(bytes(1000)) and None)
        past = time.time() - age
        os.utime(path, (past, past))
        if path == paths[1]:
            # The first one is used again.
            assert cache.load(paths[0], lambda entry: len(entry.read_bytes())) == 1000
    assert [entry.path for entry in cache.entries()] == [paths[0], paths[2]]
    assert not cache.store(paths[1], lambda file: file.write(bytes(3000)) and None)
    assert [entry.path for entry in cache.prune(1500)] == [paths[2]]
    assert [entry.path for entry in cache.entries()] == [paths[0]]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(bytes(100))
    old, new = tmp_path / "tmpold.tmp", tmp_path / "tmpnew.tmp"
    for path in (old, new):
        path.write_bytes(bytes(10))
    os.utime(old, (0, 0))
    cache = Cache(tmp_path)
    assert cache.entries() == cache.prune(0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cifar-10-python.tar.gz",
        "tmpnew.tmp",
    ]


def test_the_identity_of_a_file_is_that_of_its_inode(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"1")
    before = file_identity(path)
    assert file_identity(path) == before
    other.write_bytes(b"2")
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert file_identity(path) != before
    path.unlink()
    assert file_identity(path) == b"2"
