import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from convoy.training.data import Preprocessing, load_data, save_images
from convoy.training.data.images import read_image
from convoy.training.data.imageset import stratified_split
from convoy.training.errors import DataError


def test_digits_are_the_real_ones_split_by_class() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.valid), len(data.test)) == (1249, 249, 299)
    for part in (data.train, data.valid, data.test):
        assert part.images.shape[1:] == (32, 32, 3)
        assert part.images.dtype == np.uint8
        shares = np.bincount(part.labels, minlength=10) / len(part)
        np.testing.assert_allclose(shares, 0.1, atol=0.006)
    assert data.train.images.max() == 255
    again = load_data("digits")
    assert np.array_equal(again.test.images, data.test.images)


def test_digits_at_their_own_size_are_scikit_learns_values() -> None:
    data = load_data("digits", Preprocessing(8, 8))
    ours = np.concatenate([p.images[..., 0] for p in (data.train, data.valid, data.test)])
    theirs = np.round(sklearn_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_saved_images_are_an_image_folder_with_the_same_pixels(tmp_path: Path) -> None:
    digits = load_data("digits")
    assert save_images(digits, tmp_path / "digits") == {"train": 1249, "valid": 249, "test": 299}
    again = load_data(f"imagefolder:{tmp_path / 'digits'}", cache=tmp_path / "cache")
    assert again.classes == digits.classes
    for one, other in ((again.train, digits.train), (again.test, digits.test)):
        assert sorted(map(bytes, one.images)) == sorted(map(bytes, other.images))
        assert np.bincount(one.labels).tolist() == np.bincount(other.labels).tolist()
    with pytest.raises(DataError, match="expected one that does not exist"):
        save_images(digits, tmp_path / "digits")


def test_a_stratified_split_is_a_partition() -> None:
    labels = np.repeat([0, 1, 2], [50, 10, 2])
    kept, held_out = stratified_split(labels, 0.1, seed=0)
    assert sorted([*kept, *held_out]) == list(range(62))
    assert np.bincount(labels[held_out]).tolist() == [5, 1, 1]


def test_a_folder_gives_classes_in_order_and_a_validation_split(image_folder: Path) -> None:
    data = load_data(f"imagefolder:{image_folder}", cache=image_folder / "cache")
    assert data.classes == ("bright", "dark")
    assert (len(data.train), len(data.valid), len(data.test)) == (36, 4, 8)
    assert data.test.images[data.test.labels == 0].mean() > 150
    assert data.test.images[data.test.labels == 1].mean() < 70


def test_the_cache_is_used_until_the_folder_changes(image_folder: Path) -> None:
    spec, cache = f"imagefolder:{image_folder}", image_folder / "cache"
    load_data(spec, cache=cache)
    entries = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    load_data(spec, cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == entries
    Image.new("RGB", (40, 36), "white").save(image_folder / "test" / "dark" / "00.png")
    changed = load_data(spec, cache=cache)
    assert changed.test.images[changed.test.labels == 1].max() == 255


def test_unreadable_images_are_listed_or_left_out(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image_folder / "train" / "dark" / "03.png").write_bytes(b"no picture")
    spec, cache = f"imagefolder:{image_folder}", image_folder / "cache"
    with pytest.raises(DataError, match=r"1 unreadable images.*03\.png"):
        load_data(spec, cache=cache)
    data = load_data(spec, cache=cache, skip_bad=True)
    assert len(data.train) + len(data.valid) == 39
    assert "03.png" in caplog.text


def test_missing_and_unknown_classes_are_rejected(image_folder: Path) -> None:
    spec = f"imagefolder:{image_folder}"
    (image_folder / "train" / "bright").rename(image_folder / "train" / "light")
    with pytest.raises(DataError, match=r"split test: expected the classes of .* got also \['bri"):
        load_data(spec, cache=image_folder / "cache")
    (image_folder / "test" / "bright").rename(image_folder / "light")
    with pytest.raises(DataError, match="split test: expected images in every class, got none for"):
        load_data(spec, cache=image_folder / "cache")


def test_a_single_class_is_rejected(image_folder: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(image_folder / split / "dark")
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        load_data(f"imagefolder:{image_folder}", cache=image_folder / "cache")


@pytest.mark.parametrize("spec", ["mnist", "imagefolder:", "imagefolder:/absent"])
def test_a_wrong_specification_is_named(spec: str) -> None:
    with pytest.raises(DataError, match="expected"):
        load_data(spec)


def test_images_are_turned_resized_and_cropped_as_the_manifest_states(tmp_path: Path) -> None:
    source = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    upright = Image.fromarray(source)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    steps = Preprocessing(24, 24, resize_shorter_px=32, interpolation="bicubic")
    expected = np.asarray(upright.resize((48, 32), Image.Resampling.BICUBIC))[4:28, 12:36]
    assert np.array_equal(read_image(tmp_path / "turned.png", steps), expected)


def test_transparent_pixels_go_over_black(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", Preprocessing()).max() == 0
