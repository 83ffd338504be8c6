"""A folder of phone photos becomes a served model by the commands of docs/training.md."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.client import Client
from tests.image_files import exif
from tests.processes import run_module, running_server

LEVELS = {"cat": 70, "dog": 180}
PHOTOS = {"cat": 60, "dog": 12}
# What a phone writes for a picture taken upright: turn it by 90 degrees.
TURNED = 6


def photo(name: str, seed: int) -> Image.Image:
    level = LEVELS[name]
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(level - 40, level + 40, (90, 120, 3), np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Uneven classes, a HEIC, two broken files and a stray folder."""
    root = tmp_path / "photos"
    for name, count in PHOTOS.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            photo(name, index).save(root / name / f"IMG_{index}.JPG", exif=exif(TURNED))
        (root / name / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    (root / "cat" / "IMG_9.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / "old notes").mkdir()
    return root


def test_a_folder_of_photos_becomes_a_served_model(photos: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    data = ("--data", f"imagefolder:{photos}", "--cache-dir", tmp_path / "cache")
    recipe = ("--recipe", "digits", "--model", "net", "--batch-size", 8, "--epochs", 5)
    flags = (*recipe, "--skip-bad", "--set", "balance=weights", "--out", tmp_path / "run")
    trained = run_module("convoy.training", *data, *flags)
    assert trained.returncode == 0, trained.stderr
    assert "IMG_9.HEIC: is HEIC, which is not supported; convert it" in trained.stdout
    assert "old notes: is a folder without images" in trained.stdout
    assert trained.stdout.count("broken.jpg") == len(PHOTOS)
    checkpoint = tmp_path / "run" / "best.pt"
    exported = run_module("convoy.export", checkpoint, "--repository", models, "--name", "photos")
    assert exported.returncode == 0, exported.stderr
    with running_server(models, "--device", "cpu") as server, Client(server.address) as client:
        for name in LEVELS:
            assert client.classify(photo(name, seed=1000)).best.label == name
