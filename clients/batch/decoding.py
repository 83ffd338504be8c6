"""Encoded images to pixels, by the steps stated for ImagePreprocessing in model_manifest.proto."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from clients.batch.rows import Item
from clients.errors import ImageError
from convoy.v1 import model_manifest_pb2 as pb

Images = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# What a server takes by default. Pillow warns of somewhat more and refuses only twice that.
MAX_PIXELS = 50_000_000
_FILTERS = {
    pb.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    pb.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes `[height_px, width_px, 3]`.

    Attributes:
        resize_shorter_px: What the shorter side is brought to before the centre crop; 0 to resize
            straight to height x width.
    """

    height_px: int
    width_px: int
    resize_shorter_px: int
    filter: Image.Resampling

    @classmethod
    def of(cls, manifest: pb.ModelManifest) -> "Preprocessing":
        """Reads the steps of a manifest.

        Raises:
            ValueError: It names none, or an unknown filter.
        """
        steps = manifest.preprocessing
        if steps.interpolation not in _FILTERS:
            raise ValueError("preprocessing: interpolation: expected bilinear or bicubic")
        if not steps.height_px or not steps.width_px:
            raise ValueError("preprocessing: expected height_px and width_px above 0")
        return cls(
            steps.height_px,
            steps.width_px,
            steps.resize_shorter_px,
            _FILTERS[steps.interpolation],
        )


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """Items with their pixels, or why they have none.

    Attributes:
        keys: Of all items.
        errors: One for each item, None where it is fine.
        pixels: `[n, H, W, 3]` of the fine ones, in their order.
    """

    keys: list[str]
    errors: list[str | None]
    pixels: Images


def decode_batch(items: Sequence[Item], steps: Preprocessing) -> DecodedBatch:
    """Decodes items; a bad one becomes an error and leaves the others alone."""
    pixels = np.empty((len(items), steps.height_px, steps.width_px, 3), np.uint8)
    errors: list[str | None] = []
    fine = 0
    for item in items:
        try:
            pixels[fine] = decode(item.image, steps)
        except ImageError as error:
            errors.append(str(error))
        else:
            errors.append(None)
            fine += 1
    return DecodedBatch([item.key for item in items], errors, pixels[:fine])


def decode(image: str | bytes | Images, steps: Preprocessing) -> Images:
    """Brings one image to `[height_px, width_px, 3]` RGB.

    Args:
        image: A file's path, a file's bytes, or RGB pixels `[H, W, 3]`.
        steps: Of the model.

    Raises:
        ImageError: It is no image, damaged, or too large.
    """
    if isinstance(image, np.ndarray):
        return np.asarray(_preprocess(Image.fromarray(image), steps))
    encoded = _read(image) if isinstance(image, str) else image
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"image: expected at most {MAX_PIXELS} pixels, got {width} x {height}"
                )
            return np.asarray(_preprocess(opened, steps))  # [H, W, 3] uint8
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"image: expected a {', '.join(FORMATS)} file, got {len(encoded)} other bytes"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"image: expected at most {MAX_PIXELS} pixels, got more") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"image: expected an intact file: {error}") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ImageError("image: expected an intact file") from error


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or 'cannot be read'}") from error


def _preprocess(image: Image.Image, steps: Preprocessing) -> Image.Image:
    resized = _resize(_to_rgb(ImageOps.exif_transpose(image)), steps)
    left = (resized.width - steps.width_px) // 2
    top = (resized.height - steps.height_px) // 2
    return resized.crop((left, top, left + steps.width_px, top + steps.height_px))


def _to_rgb(image: Image.Image) -> Image.Image:
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
    return image if image.size == size else image.resize(size, steps.filter)
