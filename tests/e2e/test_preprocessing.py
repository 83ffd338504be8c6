"""Training, server and batch bring a file to pixels by three implementations of one text."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clients.batch.decoding import Preprocessing as BatchSteps
from clients.batch.decoding import decode
from server.images import decode_image
from server.manifest import Interpolation
from server.manifest import Preprocessing as ServerSteps
from training.data.images import Preprocessing as TrainingSteps
from training.data.images import read_image

STEPS = [(32, 32, 0), (32, 32, 36), (224, 224, 256), (24, 40, 48)]
INTERPOLATIONS = {"bilinear": Interpolation.BILINEAR, "bicubic": Interpolation.BICUBIC}


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colours with noise: every filter and rounding leaves its mark."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([rows, columns, (rows + columns) / 2], axis=-1) * 200
    noise = np.random.default_rng(height * width).integers(0, 56, (height, width, 3))
    return Image.fromarray((smooth + noise).astype(np.uint8))


def files(folder: Path) -> list[Path]:
    """Odd sizes, formats and modes, as people's folders have them."""
    turned = Image.Exif()
    turned[0x0112] = 8
    photo, tall, small = photograph(301, 457), photograph(643, 211), photograph(17, 13)
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 200)
    transparent = small.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(small.size))
    saved = {
        "photo.jpg": (photo, {"quality": 88}),
        "turned.jpg": (photo, {"exif": turned.tobytes()}),
        "cmyk.jpg": (tall.convert("CMYK"), {}),
        "grey.png": (tall.convert("L"), {}),
        "deep.png": (deep, {}),
        "palette.gif": (photo, {}),
        "transparent.png": (transparent, {}),
        "picture.webp": (tall, {}),
        "picture.bmp": (small, {}),
        "exact.png": (photograph(32, 32), {}),
    }
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    return [folder / name for name in saved]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_server_and_batch_see_what_training_saw(tmp_path, steps, interpolation):
    ours = ServerSteps(*steps, INTERPOLATIONS[interpolation])
    theirs = TrainingSteps(*steps, interpolation)
    local = BatchSteps(*steps, Image.Resampling[interpolation.upper()])
    for path in files(tmp_path):
        served = decode_image(path.read_bytes(), ours, max_pixels=10_000_000)[0]
        trained = read_image(path, theirs)
        np.testing.assert_array_equal(served, trained, err_msg=path.name)
        assert served.shape == (*steps[:2], 3)
        for form in (str(path), path.read_bytes()):
            np.testing.assert_array_equal(decode(form, local), trained, err_msg=path.name)
