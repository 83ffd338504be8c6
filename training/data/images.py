"""Image files to pixels, by the steps stated for ImagePreprocessing in model_manifest.proto."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from training.errors import DataError

Interpolation = Literal["bilinear", "bicubic"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image of any size becomes `[height_px, width_px, 3]`.

    `resize_shorter_px` is the length of the shorter side before the centre crop; 0 resizes straight
    to height x width.
    """

    height_px: int = 32
    width_px: int = 32
    resize_shorter_px: int = 0
    interpolation: Interpolation = "bilinear"


def read_image(path: Path, steps: Preprocessing) -> NDArray[np.uint8]:
    """Reads one file as `[height_px, width_px, 3]` RGB.

    Raises:
        DataError: The file is no image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            return preprocess(image, steps)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {error}") from error


def preprocess(image: Image.Image, steps: Preprocessing) -> NDArray[np.uint8]:
    """Brings an opened image to `[height_px, width_px, 3]` RGB."""
    resized = _resize(_to_rgb(ImageOps.exif_transpose(image)), steps)
    left = (resized.width - steps.width_px) // 2
    top = (resized.height - steps.height_px) // 2
    cropped = resized.crop((left, top, left + steps.width_px, top + steps.height_px))
    return np.asarray(cropped)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel; transparent pixels go over black."""
    if image.mode.startswith("I;16"):
        # Pillow would clip the 16 bits to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, steps: Preprocessing) -> Image.Image:
    size = (steps.width_px, steps.height_px)
    if steps.resize_shorter_px:
        scale = steps.resize_shorter_px / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
    return image if image.size == size else image.resize(size, _FILTERS[steps.interpolation])
