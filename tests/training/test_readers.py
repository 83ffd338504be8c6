import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convoy.training.augment import ImageAugmentation
from convoy.training.data import ImageFiles, ImageSet, Preprocessing, open_data
from convoy.training.errors import DataError
from convoy.training.normalization import measure
from convoy.training.readers import FileReader, MemoryReader
from convoy.training.recipe import Recipe

CPU = torch.device("cpu")
STEPS = Preprocessing(16, 16)
BATCHES = [torch.tensor([3, 0, 7]), torch.tensor([1]), torch.tensor([7, 35])]


def open_both(folder: Path) -> tuple[ImageSet, ImageFiles]:
    spec, cache = f"imagefolder:{folder}", folder / "cache"
    memory = open_data(spec, STEPS, stream=False, cache=cache).train
    files = open_data(spec, STEPS, stream=True, cache=cache).train
    assert isinstance(memory, ImageSet)
    assert isinstance(files, ImageFiles)
    return memory, files


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_files_give_the_batches_that_memory_gives_pass_after_pass(
    image_folder: Path, workers: int
) -> None:
    memory, files = open_both(image_folder)
    streamed, held = FileReader(files, CPU, workers), MemoryReader(memory, CPU)
    assert torch.equal(streamed.labels, held.labels)
    for plan in (BATCHES, BATCHES[::-1]):
        ours, expected = list(streamed.read(plan)), list(held.read(plan))
        assert len(ours) == len(expected) == len(plan)
        assert all(map(torch.equal, ours, expected))


def test_constants_measured_from_files_are_those_of_the_pixels(image_folder: Path) -> None:
    memory, files = open_both(image_folder)
    assert measure(files) == measure(memory)
    np.testing.assert_allclose(measure(files).std, (memory.images / 255).std((0, 1, 2)), rtol=1e-9)


def test_a_set_is_streamed_only_when_it_is_large(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, cache = f"imagefolder:{image_folder}", image_folder / "cache"
    assert isinstance(open_data(spec, STEPS, cache=cache).train, ImageSet)
    monkeypatch.setattr("convoy.training.data.STREAM_OVER_BYTES", 40 * 16 * 16 * 3 - 1)
    assert isinstance(open_data(spec, STEPS, cache=cache).train, ImageFiles)
    assert isinstance(open_data("digits", STEPS, stream=True).train, ImageSet)


def test_unreadable_files_are_found_before_they_are_streamed(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image_folder / "train" / "dark" / "03.png").write_bytes(b"no picture")
    spec, cache = f"imagefolder:{image_folder}", image_folder / "cache"
    with pytest.raises(DataError, match=r"1 unreadable images.*03\.png"):
        open_data(spec, STEPS, stream=True, cache=cache)
    data = open_data(spec, STEPS, stream=True, cache=cache, skip_bad=True)
    assert len(data.train) + len(data.valid) == 39
    assert "03.png" in caplog.text


def test_files_are_looked_at_once_and_again_when_they_change(image_folder: Path) -> None:
    spec, cache = f"imagefolder:{image_folder}", image_folder / "cache"
    before = open_data(spec, STEPS, stream=True, cache=cache).train
    entries = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    open_data(spec, STEPS, stream=True, cache=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == entries
    for path in (image_folder / "train" / "dark").iterdir():
        Image.new("RGB", (40, 36), "white").save(path)
    changed = open_data(spec, STEPS, stream=True, cache=cache).train
    assert measure(changed).mean > measure(before).mean


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_disk_under_the_cache_is_a_warning(
    image_folder: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A full disk, as far as one process can make one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        spec, cache = f"imagefolder:{image_folder}", image_folder / "cache"
        data = open_data(spec, STEPS, stream=stream, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(data.train) == 36
    assert "cannot cache" in caplog.text
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_bad_is_one_line_or_counted(
    workers: int, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, files = open_both(image_folder)
    bad = files.listing.paths[3]
    bad.write_bytes(b"no picture")
    reader = FileReader(files, CPU, workers)
    reason = re.escape(f"train, class 'bright': {bad}")
    # Without `as`: an exception that is kept keeps the reader in a cycle, and torch takes five
    # seconds to end the workers of a loader that the garbage collector finds.
    with pytest.raises(DataError, match=rf"\A.*{reason}.*\Z"):
        list(reader.read(BATCHES))
    skipping = FileReader(files, CPU, workers, skip_bad=True)
    for _ in range(2):
        pixels = list(skipping.read(BATCHES))
        # The next image of the class stands in.
        assert torch.equal(pixels[0][0], torch.from_numpy(files.read([4])[0]))
    assert caplog.text.count("replaced an unreadable image by another of its class, 1 so far") == 1


@pytest.mark.slow
def test_augmented_images_come_from_memory_and_from_files(image_folder: Path) -> None:
    memory, files = open_both(image_folder)
    recipe = Recipe(image_size=16, color_jitter=0.5)
    augmentation = ImageAugmentation(recipe, STEPS)
    held, streamed = (
        FileReader(images, CPU, 0, augmentation=augmentation) for images in (memory, files)
    )
    first, second = (list(streamed.read(BATCHES, epoch)) for epoch in (0, 1))
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, first, held.read(BATCHES, 0)))
    plain = list(streamed.read(BATCHES))
    assert all(map(torch.equal, plain, MemoryReader(memory, CPU).read(BATCHES)))
