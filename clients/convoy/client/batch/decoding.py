"""Encoded images to pixels, by the steps stated for ImagePreprocessing in model_manifest.proto."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.client.batch.items import Item
from convoy.client.errors import ImageError
from convoy.client.image_file import ImageFileError, decode_rgb, fit, to_rgb
from convoy.client.images import check_size, read_image
from convoy.v1 import model_manifest_pb2 as pb

Images = NDArray[np.uint8]

_FILTERS = {
    pb.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    pb.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes `[height_px, width_px, 3]`.

    Attributes:
        resize_shorter_px: Length of the shorter side before the center crop; 0 to resize
            straight to height x width.
        antialias: See `convoy.client.image_file.fit`.
        scaled_decoding: Whether JPEGs are decoded at a fraction of their size, as
            `convoy.client.image_file.decode_rgb` states.
    """

    height_px: int
    width_px: int
    resize_shorter_px: int
    filter: Image.Resampling
    antialias: bool = True
    scaled_decoding: bool = False

    @classmethod
    def of(cls, manifest: pb.ModelManifest) -> "Preprocessing":
        """Read the steps of a manifest.

        Raises:
            ValueError: It names none, or an unknown filter.
        """
        steps = manifest.preprocessing
        if steps.interpolation not in _FILTERS:
            raise ValueError("preprocessing: interpolation: expected bilinear or bicubic")
        if not steps.height_px or not steps.width_px:
            raise ValueError("preprocessing: expected height_px and width_px above 0")
        if steps.decoding not in {pb.DECODING_UNSPECIFIED, pb.DECODING_SCALED}:
            raise ValueError("preprocessing: decoding: expected a known one")
        return cls(
            steps.height_px,
            steps.width_px,
            steps.resize_shorter_px,
            _FILTERS[steps.interpolation],
            not steps.without_antialias,
            steps.decoding == pb.DECODING_SCALED,
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
    """Decode items; a bad one becomes an error and leaves the others alone."""
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


def decode(image: str | bytes | Images | ImageError, steps: Preprocessing) -> Images:
    """Bring one image to `[height_px, width_px, 3]` RGB.

    Args:
        image: A file's path, a file's bytes, or RGB pixels `[H, W, 3]`.
        steps: Of the model.

    Raises:
        ImageError: It is not an image, damaged, or over a limit, which the server has too.
    """
    if isinstance(image, ImageError):
        raise image
    try:
        if isinstance(image, np.ndarray):
            return _fitted(Image.fromarray(image), steps)
        encoded = _read(image) if isinstance(image, str) else image
        check_size(len(encoded))
        size_px = (steps.width_px, steps.height_px)
        scaled_for = (size_px, steps.resize_shorter_px) if steps.scaled_decoding else None
        return _fitted(decode_rgb(encoded, scaled_for=scaled_for), steps)
    except ImageFileError as error:
        raise ImageError(f"image: {error}") from error
    except MemoryError as error:
        raise ImageError("image: not enough memory to decode it") from error


def _fitted(image: Image.Image, steps: Preprocessing) -> Images:
    size_px = (steps.width_px, steps.height_px)
    shorter_px = steps.resize_shorter_px
    return np.asarray(fit(to_rgb(image), size_px, shorter_px, steps.filter, steps.antialias))


def _read(path: str) -> bytes:
    try:
        return read_image(path)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or 'cannot be read'}") from error
