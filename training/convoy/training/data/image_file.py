"""Open an image file within fixed limits and bring it to a model's size.

There is one policy for serving, training and batch jobs. The parts do not import each other, so
each has a copy of this module. A test keeps the copies identical. docs/serving.md, "Image files",
states the limits, ImagePreprocessing in model_manifest.proto the steps.
"""

import io
import math
import re
import struct
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# The server's default.
MAX_PIXELS = 50_000_000
# Pillow needs memory for each row of an image, and for each row and column of a resize.
MAX_SIDE_PX = 65_535
# Each scan of a progressive JPEG passes over the whole picture, even with few bytes.
MAX_SCANS = 500
MAX_PROCESSOR_S = 10.0
# Upper bounds of the memory for decoding, without 32 MiB and two copies of the file.
BYTES_A_PIXEL = 12
WEBP_BYTES_A_PIXEL = 16

_LOOK_EVERY_S = 0.01
# The most work between two looks.
_MAX_UNSEEN_S = 0.3
_STRIP_PIXELS = 1 << 18
# Bytes x pixels that the JPEG decoder gets at once: at most about 0.3 s of work.
_JPEG_FEED = 1 << 35
_READ_BYTES = 1 << 16

_ORIENTATION_TAG = 0x0112
_EXIF_PREFIX = b"Exif\0\0"
_TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_TIFF_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Those that swap width and height.
_SIDEWAYS = frozenset({5, 6, 7, 8})

_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
# Comments and application data, except JFIF's and Adobe's, which define the channels.
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_JPEG_END, _JPEG_WITHOUT_LENGTH = 0xD9, frozenset({0xD8})
_PNG_START = b"\x89PNG\r\n\x1a\n"
_WEBP_START = re.compile(rb"RIFF....WEBP(VP8[ LX])", re.DOTALL)
# Below this, the memory is negligible.
_SMALL_PIXELS = 1 << 20


class ImageFileError(Exception):
    """This policy does not accept the file; the message gives the reason."""


class DecodingStoppedError(Exception):
    """The caller stopped the decoding."""


def decode_rgb(
    encoded: bytes,
    max_pixels: int = MAX_PIXELS,
    stopped: Callable[[], bool] = lambda: False,
    scaled_for: tuple[tuple[int, int], int] | None = None,
) -> Image.Image:
    """Decode the first frame of an image file, upright.

    Args:
        encoded: A JPEG, PNG, WebP, BMP or GIF file.
        max_pixels: Limit of width x height; a larger image is rejected before its pixels are
            allocated.
        stopped: Called during the decoding; returns true if the result is no longer needed.
        scaled_for: `size_px` and `resize_shorter_px` of `fit`. A JPEG is decoded at the smallest of
            1/8, 1/4, 1/2 and 1 of its size at which no side is shorter than `fit` resizes it to;
            None decodes all pixels.

    Returns:
        An RGB image: transparent pixels over black, the high byte of 16-bit gray.

    Raises:
        ImageFileError: The file is not an image, damaged, or over a limit.
        DecodingStoppedError: `stopped` returned true.
        MemoryError: There is no memory for the pixels.
    """
    watch = _Watch(stopped)
    try:
        return _decode_rgb(encoded, max_pixels, watch, scaled_for)
    except (ImageFileError, DecodingStoppedError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageFileError(
            f"expected a {', '.join(FORMATS)} file, got {len(encoded)} other bytes"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageFileError(f"expected at most {max_pixels} pixels, got more") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageFileError(f"expected an intact file: {error}") from error
    except Exception as error:  # the exception for a damaged file depends on the decoder
        raise ImageFileError("expected an intact file") from error


def upright(image: Image.Image) -> Image.Image:
    """Rotate or mirror an opened image by its EXIF orientation."""
    image.load()  # a PNG may have its EXIF data after the pixels
    return _turned(image, _orientation(image.info.get("exif", b"")))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits per channel, in strips if that needs intermediate images."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if not image.has_transparency_data and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        return _flattened(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_flattened(strip), (0, top))
    return whole


class _Watch:
    """Stops a decoding that is no longer needed, or that takes too much processor time."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped
        self._started_s = time.monotonic()
        self._next_look_s = self._started_s + _LOOK_EVERY_S
        self._processor_started_s: float | None = None

    def check(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_EVERY_S
        if self._stopped():
            raise DecodingStoppedError
        processor_s = time.thread_time()
        if self._processor_started_s is None:
            # Asking at the start would cost each small file a system call. Until the first look the
            # processor took no more time than passed, and less if the process was stopped.
            passed_s = min(now_s - self._started_s, _MAX_UNSEEN_S)
            self._processor_started_s = processor_s - passed_s
        if processor_s - self._processor_started_s > MAX_PROCESSOR_S:
            raise ImageFileError(f"expected at most {MAX_PROCESSOR_S:g} s of processor time")


class _WatchedFile(io.BytesIO):
    """A file that Pillow reads in blocks, with a check of the time before each."""

    def __init__(self, content: bytes, watch: _Watch) -> None:
        super().__init__(content)
        self._watch = watch

    def read(self, size: int | None = -1, /) -> bytes:
        self._watch.check()
        return super().read(size)


def _decode_rgb(
    encoded: bytes,
    max_pixels: int,
    watch: _Watch,
    scaled_for: tuple[tuple[int, int], int] | None,
) -> Image.Image:
    exif = b""
    bytes_a_pixel, read_bytes = BYTES_A_PIXEL, _READ_BYTES
    is_jpeg = encoded.startswith(_JPEG_START)
    if is_jpeg:
        _check_scans(encoded)
        encoded, exif = _split_jpeg(encoded)
    elif encoded.startswith(_PNG_START):
        encoded, exif = _split_png(encoded, watch)
    elif webp := _WEBP_START.match(encoded):
        # Pillow allocates the pixels of a WebP when it opens it.
        bytes_a_pixel = WEBP_BYTES_A_PIXEL
        _check_room(_webp_size(encoded, webp[1]), max_pixels, bytes_a_pixel)
    with Image.open(_WatchedFile(encoded, watch), formats=FORMATS) as image:
        _check_room(image.size, max_pixels, bytes_a_pixel)
        if is_jpeg:
            read_bytes = _JPEG_FEED // (image.width * image.height)
            if scaled_for:
                _scale_jpeg(image, _orientation(exif), *scaled_for)
        image.decodermaxblock = max(512, min(_READ_BYTES, read_bytes))
        image.load()
        orientation = _orientation(exif or image.info.get("exif", b""))
        watch.check()
        rgb = to_rgb(image)
    watch.check()
    del image  # frees its pixels before the rotation copies them
    return _turned(rgb, orientation)


def _scale_jpeg(
    image: Image.Image, orientation: int, size_px: tuple[int, int], resize_shorter_px: int
) -> None:
    """Let the inverse DCT of an opened JPEG give an image of half, a quarter or an eighth."""
    needed_px = size_px[::-1] if orientation in _SIDEWAYS else size_px
    if resize_shorter_px:
        needed_px, _ = _geometry(image.size, size_px, resize_shorter_px)
    image.draft(None, needed_px)


def _check_room(size_px: tuple[int, int], max_pixels: int, bytes_a_pixel: int) -> None:
    width, height = size_px
    if width * height > max_pixels:
        raise ImageFileError(f"expected at most {max_pixels} pixels, got {width} x {height}")
    if max(size_px) > MAX_SIDE_PX:
        raise ImageFileError(f"expected sides of at most {MAX_SIDE_PX} px, got {width} x {height}")
    if width * height > _SMALL_PIXELS:
        # libjpeg and libwebp report a lack of memory as a damaged file. Allocated but not written.
        np.empty(width * height * bytes_a_pixel, np.uint8)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _TRANSPOSES:
        return image
    return image.transpose(_TRANSPOSES[orientation])


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip the 16 bits to 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")


def _orientation(exif: bytes) -> int:
    """Read the orientation of EXIF data, and no other tag; 1 if there is none.

    Pillow's reader parses every tag and raises for one of a wrong type.
    """
    while exif.startswith(_EXIF_PREFIX):
        exif = exif[len(_EXIF_PREFIX) :]
    order = _TIFF_ORDERS.get(exif[:4], "")
    if not order:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", exif, at)
            if tag == _ORIENTATION_TAG and values == 1 and kind in _TIFF_WHOLE_NUMBERS:
                (value,) = struct.unpack_from(order + _TIFF_WHOLE_NUMBERS[kind], exif, at + 8)
                return int(value)
    except struct.error:
        pass  # the data ends early
    return 1


def _webp_size(encoded: bytes, kind: bytes) -> tuple[int, int]:
    """Read width and height from a WebP's header; zeros if it ends early."""
    if kind == b"VP8X":
        sides = encoded[24:27], encoded[27:30]
        return (1 + int.from_bytes(sides[0], "little"), 1 + int.from_bytes(sides[1], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = encoded[26:28], encoded[28:30]
    return (int.from_bytes(width, "little") & 0x3FFF, int.from_bytes(height, "little") & 0x3FFF)


def _check_scans(encoded: bytes) -> None:
    # Other data may contain the two bytes too, so this count is an upper bound.
    if encoded.count(_JPEG_SCAN) > MAX_SCANS and _count_scans(encoded) > MAX_SCANS:
        raise ImageFileError(f"expected a JPEG of at most {MAX_SCANS} scans, got more")


def _count_scans(encoded: bytes) -> int:
    """Count the scans of a JPEG up to its end, without those of thumbnails in its metadata."""
    scans, at = 0, 0
    # The scan's header is followed by coded data, which contains only other markers.
    while marker := _JPEG_MARKER.search(encoded, at):
        code, at = marker[1][0], marker.end()
        if code == _JPEG_END:
            break
        scans += code == _JPEG_SCAN[1]
        if code not in _JPEG_WITHOUT_LENGTH:
            at += int.from_bytes(encoded[at : at + 2])
    return scans


def _split_jpeg(encoded: bytes) -> tuple[bytes, bytes]:
    """Remove the metadata from a JPEG's header; return the rest and the EXIF data."""
    kept: list[bytes] = []
    exif = b""
    kept_from, at = 0, len(_JPEG_START)
    while encoded[at : at + 1] == b"\xff" and at + 4 <= len(encoded):
        code = encoded[at + 1]
        if code == 0xFF:  # fill byte
            at += 1
            continue
        if code < 0xC0 or code == _JPEG_SCAN[1] or 0xD0 <= code <= _JPEG_END:
            break
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4])
        if code in _JPEG_METADATA:
            if code == 0xE1 and not exif and encoded.startswith(_EXIF_PREFIX, at + 4):
                exif = encoded[at + 4 : end]
            kept.append(encoded[kept_from:at])
            kept_from = end
        at = end
    return (b"".join([*kept, encoded[kept_from:]]) if kept else encoded), exif


def _split_png(encoded: bytes, watch: _Watch) -> tuple[bytes, bytes]:
    """Remove the chunks of a PNG that do not affect its pixels; return also the EXIF data."""
    kept: list[bytes] = []
    exif = b""
    kept_from = at = len(_PNG_START)
    while at + 8 <= len(encoded):
        watch.check()
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + 12 + length
        # A lower-case first letter marks an ancillary chunk.
        if kind.isalpha() and kind[:1].islower() and kind != b"tRNS":
            if kind == b"eXIf":
                exif = encoded[at + 8 : end - 4]
            kept.append(encoded[kept_from:at])
            kept_from = end
        at = end
        if kind == b"IEND":
            break
    if not kept:
        return encoded, exif
    return b"".join([_PNG_START, *kept, encoded[kept_from:]]), exif


# Above this, or four times the model's size if that is more, there is no intermediate image.
MAX_RESIZED_PIXELS = 1 << 22

_SUPPORT_PX = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


def fit(
    image: Image.Image,
    size_px: tuple[int, int],
    resize_shorter_px: int,
    resampling: Image.Resampling,
    antialias: bool = True,
) -> Image.Image:
    """Resize, then crop the center.

    Args:
        image: RGB.
        size_px: Width and height of the result.
        resize_shorter_px: Length of the shorter side before the crop; 0 resizes straight to
            `size_px`.
        resampling: BILINEAR or BICUBIC.
        antialias: Average all pixels that an output pixel covers; otherwise interpolate between
            those next to its center, which is defined for BILINEAR only.
    """
    if not antialias:
        return _interpolated(image, size_px, resize_shorter_px)
    limit = max(MAX_RESIZED_PIXELS, 4 * size_px[0] * size_px[1])
    if not resize_shorter_px:
        return _stretched(image, size_px, resampling, limit)
    resized_px, (left, top) = _geometry(image.size, size_px, resize_shorter_px)
    if resized_px[0] * resized_px[1] > limit:
        return _resized_center(image, resized_px, (left, top), size_px, resampling)
    if image.size != resized_px:
        image = image.resize(resized_px, resampling)
    return image.crop((left, top, left + size_px[0], top + size_px[1]))


def _geometry(
    from_px: tuple[int, int], size_px: tuple[int, int], resize_shorter_px: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size before the crop, and the crop's left and top."""
    scale = resize_shorter_px / min(from_px)
    resized_px = (round(from_px[0] * scale), round(from_px[1] * scale))
    return resized_px, (
        (resized_px[0] - size_px[0]) // 2,
        (resized_px[1] - size_px[1]) // 2,
    )


def _interpolated(
    image: Image.Image, size_px: tuple[int, int], resize_shorter_px: int
) -> Image.Image:
    """Interpolate at the center of each pixel of the crop."""
    resized_px, corner_px = size_px, (0, 0)
    if resize_shorter_px:
        resized_px, corner_px = _geometry(image.size, size_px, resize_shorter_px)
    x_scale, y_scale = image.width / resized_px[0], image.height / resized_px[1]
    # From output to input coordinates.
    matrix = (x_scale, 0.0, corner_px[0] * x_scale, 0.0, y_scale, corner_px[1] * y_scale)
    return image.transform(
        size_px, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


def _stretched(
    image: Image.Image, size_px: tuple[int, int], resampling: Image.Resampling, limit: int
) -> Image.Image:
    if image.size == size_px:
        return image
    # Pillow resizes the rows first: a narrow, high image would be enlarged before it is reduced.
    if size_px[0] > image.width and size_px[0] * image.height > limit:
        image = image.resize((image.width, size_px[1]), resampling)
    return image.resize(size_px, resampling)


def _resized_center(
    image: Image.Image,
    resized_px: tuple[int, int],
    corner_px: tuple[int, int],
    size_px: tuple[int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    """Compute only the part of the resized image that the crop keeps."""
    support_px = _SUPPORT_PX[resampling]
    left, right, x0, x1 = _source(image.width, resized_px[0], corner_px[0], size_px[0], support_px)
    top, bottom, y0, y1 = _source(image.height, resized_px[1], corner_px[1], size_px[1], support_px)
    # If the image is smaller than the crop, the crop has a black border.
    inner_px = tuple(min(n, m) for n, m in zip(size_px, resized_px, strict=True))
    part = image.crop((left, top, right, bottom))
    # In Pillow's order for enlarging, because the 8 bits between the passes round and clip.
    part = part.resize((inner_px[0], part.height), resampling, box=(x0, 0, x1, part.height))
    part = part.resize((inner_px[0], inner_px[1]), resampling, box=(0, y0, inner_px[0], y1))
    x, y = min(corner_px[0], 0), min(corner_px[1], 0)
    return part.crop((x, y, x + size_px[0], y + size_px[1]))


def _source(
    length_px: int, resized_px: int, start_px: int, count_px: int, support_px: float
) -> tuple[int, int, float, float]:
    """Find the source pixels of a run of resized pixels, along one side.

    Returns:
        Start and end of the pixels that the filter needs, and of the run itself within those.
    """
    scale = length_px / resized_px
    start = max(start_px, 0) * scale
    end = min(start_px + count_px, resized_px) * scale
    margin = support_px * max(scale, 1.0) + 1
    first = max(0, math.floor(start - margin))
    last = min(length_px, math.ceil(end + margin))
    return first, last, start - first, min(end - first, last - first)
