"""Folders as people have them: what is read, and what is left out and why."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.training.data import Shares, load_data
from convoy.training.data.folder import find
from convoy.training.errors import DataError


def save(path: Path, seed: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders without train/ and test/, ten images each."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog")):
        for index in range(10):
            save(root / name / f"{index}.png", 100 * label + index)
    return root


def reasons(root: Path) -> dict[str, str]:
    return {Path(each.name).name: each.reason for each in find(root).left_out}


def test_plain_class_folders_are_split_by_share(photos: Path) -> None:
    spec, cache = f"imagefolder:{photos}", photos.parent / "cache"
    data = load_data(spec, cache=cache)
    assert data.classes == ("cat", "dog")
    assert [len(part) for part in (data.train, data.valid, data.test)] == [16, 2, 2]
    again = load_data(spec, cache=cache, shares=Shares(valid=0.2, test=0.3))
    for part, count in ((again.train, 6), (again.valid, 1), (again.test, 3)):
        assert np.bincount(part.labels).tolist() == [count, count]
    parts = (again.train, again.valid, again.test)
    assert len({bytes(image) for part in parts for image in part.images}) == 20
    with pytest.raises(DataError, match="valid_share: expected 0 < x < 1, got 1"):
        Shares(valid=1)


@pytest.mark.parametrize("name", ["valid", "val", "validation", "Val"])
def test_a_validation_folder_has_one_of_the_usual_names(
    name: str, image_folder: Path, tmp_path: Path
) -> None:
    for label in ("bright", "dark"):
        save(image_folder / name / label / "0.png")
    data = load_data(f"imagefolder:{image_folder}", cache=tmp_path / "cache")
    assert (len(data.train), len(data.valid), len(data.test)) == (40, 2, 8)
    (image_folder / ("validation" if name != "validation" else "val")).mkdir()
    with pytest.raises(DataError, match="expected one folder for the split valid"):
        load_data(f"imagefolder:{image_folder}", cache=tmp_path / "cache")


def test_a_test_folder_without_train_is_one_line(photos: Path) -> None:
    (photos / "test").mkdir()
    with pytest.raises(DataError, match=r"expected a folder .*photos/train beside test"):
        find(photos)


def test_whatever_is_not_read_is_named_with_its_reason(photos: Path) -> None:
    save(photos / "cat" / ".ipynb_checkpoints" / "0.png")
    save(photos / "@eaDir" / "thumb.png")
    save(photos / "cat" / "._x.png")
    (photos / "cat" / "gone.png").symlink_to(photos / "nowhere.png")
    (photos / "cat" / "notes.txt").write_text("a cat")
    (photos / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (photos / "cat" / "scan.avif").write_bytes(b"\0\0\0\x18ftypavif" + bytes(40))
    (photos / "export").mkdir()
    (photos / "readme.md").write_text("photos")
    found = find(photos)
    assert found.classes == ("cat", "dog")
    assert len(found.splits["train"].refs) == 20
    convert = "which is not supported; convert it to JPEG or PNG"
    assert reasons(photos) == {
        ".ipynb_checkpoints": "is hidden",
        "@eaDir": "is hidden",
        "._x.png": "is hidden",
        "gone.png": "is a broken link",
        "notes.txt": "has the suffix .txt",
        "IMG_1.HEIC": f"is HEIC, {convert}",
        "scan.avif": f"is AVIF, {convert}",
        "export": "is a folder without images",
        "readme.md": "is outside the class folders",
    }


def test_an_image_is_known_by_its_content_behind_an_unusual_suffix(photos: Path) -> None:
    for index, suffix in enumerate((".jfif", ".jpe", ".tif", ".heic", ".avif")):
        save(photos / "dog" / f"photo{suffix}", 500 + index, format="JPEG")
    assert len(find(photos).splits["train"].refs) == 25
    assert not find(photos).left_out
    assert len(load_data(f"imagefolder:{photos}", cache=photos.parent / "cache").train) == 20


def test_linked_folders_are_followed_once(photos: Path, tmp_path: Path) -> None:
    save(tmp_path / "more" / "a.png", 900)
    (photos / "cat" / "more").symlink_to(tmp_path / "more")
    (photos / "cat" / "again").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "loop").symlink_to(photos / "cat")
    found = find(photos)
    assert np.bincount(found.splits["train"].labels).tolist() == [11, 10]
    assert [each.reason for each in found.left_out] == [
        "is a link to a folder that was already read"
    ] * 2


def test_names_that_are_not_utf_8(photos: Path) -> None:
    source = (photos / "cat" / "0.png").read_bytes()
    (Path(os.fsdecode(bytes(photos / "cat") + b"/caf\xe9.png"))).write_bytes(source + b" ")
    data = load_data(f"imagefolder:{photos}", cache=photos.parent / "cache")
    assert len(data.train) == 17
    (Path(os.fsdecode(bytes(photos / "cat") + b"/m\xfcll.png"))).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train, class 'cat': .*m\\xfcll\.png: expected"):
        load_data(f"imagefolder:{photos}", cache=photos.parent / "cache")
    folder = Path(os.fsdecode(bytes(photos) + b"/caf\xe9"))
    save(folder / "a.png")
    with pytest.raises(DataError, match=r"class folder 'caf\\xe9': expected a name in UTF-8"):
        find(photos)


def test_the_report_says_what_is_there(photos: Path) -> None:
    for index in range(30):
        save(photos / "dog" / f"more{index}.jpg", 600 + index)
    source = (photos / "dog" / "0.png").read_bytes()
    (photos / "dog" / "copy.png").write_bytes(source)
    (photos / "dog" / "bad.png").write_bytes(b"no image")
    (photos / "cat" / "IMG.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    spec = f"imagefolder:{photos}"
    cache = photos.parent / "cache"
    data = load_data(spec, cache=cache, skip_bad=True, shares=Shares(0.5, 0.3))
    assert data.inventory is not None
    text = "\n".join(data.inventory.lines())
    assert [row.split() for row in text.splitlines()[:4]] == [
        ["class", "train", "valid", "test"],
        ["cat", "3", "4", "3"],
        ["dog", "15", "14", "12"],
        ["all", "18", "18", "15"],
    ]
    assert "files: 30 JPEG, 21 PNG" in text
    assert "30 x 24 to 30 x 24 px" in text
    assert "images of 30 x 24 px are resized to 32 x 32 px, which changes their aspect" in text
    assert "IMG.heic: is HEIC" in text
    assert "left out, unreadable: train, class 'dog': " in text
    assert "1 images of train repeat another one of it" in text


def test_the_report_warns_of_test_images_that_were_trained_on(image_folder: Path) -> None:
    for index in range(3):
        source = image_folder / "train" / "dark" / f"0{index}.png"
        (image_folder / "test" / "dark" / f"t{index}.png").write_bytes(source.read_bytes())
    data = load_data(f"imagefolder:{image_folder}", cache=image_folder / "cache")
    lines = list(data.inventory.lines())
    assert any(line.startswith("duplicates: 3 images of test are in train too") for line in lines)
