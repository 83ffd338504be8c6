from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes, dark and bright, 20 images each to train on and 4 each to test."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for split, count in (("train", 20), ("test", 4)):
        for name, level in (("bright", 180), ("dark", 40)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(level - 30, level + 30, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return root
