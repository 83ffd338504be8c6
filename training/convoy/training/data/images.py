"""Image files to pixels, by the steps of ImagePreprocessing in model_manifest.proto."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.training.data.image_file import ImageFileError, decode_rgb, fit, to_rgb
from convoy.training.errors import DataError

Decode = Literal["exact", "scaled"]
Interpolation = Literal["bilinear", "bicubic"]

SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp"})
OTHER_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".tif", ".tiff"})
"""Suffixes of unsupported formats; a file with one of them may still be of a supported format."""
# 16-bit RGBA at the limit of pixels needs 381 MiB uncompressed.
MAX_FILE_BYTES = 512 * 2**20

HEADER_BYTES = 16
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_HEIF_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image of any size becomes `[height_px, width_px, 3]`.

    `resize_shorter_px` is the length of the shorter side before the center crop; 0 resizes straight
    to height x width. Without `antialias` each pixel is interpolated between the input's pixels
    next to its center, as OpenCV and torchvision's `antialias=False` do; bilinear only. With
    `decode` "scaled", JPEGs are decoded at a fraction of their size, as `image_file.decode_rgb`
    states, and "exact" decodes all pixels.
    """

    height_px: int = 32
    width_px: int = 32
    resize_shorter_px: int = 0
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    decode: Decode = "exact"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of an encoded image are: a file, or a part of one.

    Attributes:
        path: Of the file.
        offset: Where the part begins, in bytes.
        size: Of the part, in bytes; -1 means up to the end.
        name: The name of a part in messages.
    """

    path: Path
    offset: int = 0
    size: int = -1
    name: str = ""

    def __str__(self) -> str:
        return printable(self.name or self.path)

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            OSError: The file cannot be read.
            ImageFileError: It exceeds the limit, which is also the server's.
        """
        with self.path.open("rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size if self.size < 0 else self.size
            if size_bytes > MAX_FILE_BYTES:
                raise ImageFileError(f"expected at most {MAX_FILE_BYTES} bytes, got {size_bytes}")
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Look:
    """The properties of one image file.

    Attributes:
        format: As `format_of` names it.
        digest: Of its content, to find duplicates.
    """

    format: str
    width_px: int
    height_px: int
    size_bytes: int
    digest: bytes


def read_image(where: Path | ImageRef, steps: Preprocessing) -> NDArray[np.uint8]:
    """Read one file as `[height_px, width_px, 3]` RGB.

    Raises:
        DataError: The file is not an image, damaged, or over a limit of the image policy.
    """
    return read_and_look(where, steps)[0]


def read_and_look(where: Path | ImageRef, steps: Preprocessing) -> tuple[NDArray[np.uint8], Look]:
    """Read one file as `read_image` does; return its properties too.

    Raises:
        DataError: As `read_image`.
    """
    ref = where if isinstance(where, ImageRef) else ImageRef(where)
    image, content = _read(ref, steps if steps.decode == "scaled" else None)
    digest = hashlib.blake2b(content, digest_size=16).digest()
    width_px, height_px = image.size if steps.decode == "exact" else _upright_size(content, image)
    look = Look(format_of(content), width_px, height_px, len(content), digest)
    try:
        return preprocess(image, steps), look
    except MemoryError as error:
        raise DataError(f"{ref}: not enough memory to resize it") from error


def read_original(ref: ImageRef) -> tuple[Image.Image, bytes]:
    """Read one file as an upright RGB image of its own size; return its bytes too.

    Raises:
        DataError: As `read_image`.
    """
    return _read(ref, None)


def _read(ref: ImageRef, scaled_for: Preprocessing | None) -> tuple[Image.Image, bytes]:
    try:
        content = ref.read()
        return decode_file(content, scaled_for), content
    except OSError as error:
        # The text of an OSError repeats the path, possibly with bytes that cannot be printed.
        raise DataError(f"{ref}: {error.strerror or error}") from error
    except ImageFileError as error:
        raise DataError(f"{ref}: {error}") from error
    except MemoryError as error:
        raise DataError(f"{ref}: not enough memory to decode it") from error


def decode_file(content: bytes, scaled_for: Preprocessing | None) -> Image.Image:
    """Decode a file upright, whole or scaled for these steps.

    Raises:
        ImageFileError: It is no image, damaged, or over a limit of the image policy.
    """
    if scaled_for is None:
        return decode_rgb(content)
    size_px = (scaled_for.width_px, scaled_for.height_px)
    return decode_rgb(content, scaled_for=(size_px, scaled_for.resize_shorter_px))


def _upright_size(content: bytes, decoded: Image.Image) -> tuple[int, int]:
    """Return width and height of the whole image of a file that was decoded scaled."""
    with Image.open(io.BytesIO(content)) as image:
        width_px, height_px = image.size
    turned = (decoded.width > decoded.height) != (width_px > height_px)
    return (height_px, width_px) if turned else (width_px, height_px)


def preprocess(image: Image.Image, steps: Preprocessing) -> NDArray[np.uint8]:
    """Bring an upright image to `[height_px, width_px, 3]` RGB."""
    size_px = (steps.width_px, steps.height_px)
    filter_ = _FILTERS[steps.interpolation]
    shorter_px = steps.resize_shorter_px
    return np.asarray(fit(to_rgb(image), size_px, shorter_px, filter_, steps.antialias))


def format_of(content: bytes) -> str:
    """Return the format of a file by its first HEADER_BYTES; empty if it is unknown."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[4:8] == b"ftyp":
        return _HEIF_BRANDS.get(content[8:12], "")
    return next((name for magic, name in _MAGIC.items() if content.startswith(magic)), "")


def printable(name: str | Path) -> str:
    r"""Return a file's name as text that any stream can write; other bytes than UTF-8 as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
