"""Image files that once crashed, stopped or misled a part of Convoy, built anew."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

# name -> what the policy says of it: whether it is decoded.
AWKWARD = {
    "exif-xresolution-ascii.jpg": True,
    "exif-signed-rational.jpg": True,
    "thin-1x8000.png": True,
    "jpeg-600-scans.jpg": False,
    "tiff-named.jpg": False,
    "avif-named.jpg": False,
    "eps-named.jpg": False,
    "png-ztxt-1.1MB.png": True,
}

_ASCII, _SHORT, _SIGNED_RATIONAL = 2, 3, 10
_X_RESOLUTION = 0x011A


def photograph(height: int, width: int) -> Image.Image:
    """Smooth colors with noise: every filter and rounding leaves its mark."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([rows, columns, (rows + columns) / 2], axis=-1) * 200
    noise = np.random.default_rng(height * width).integers(0, 56, (height, width, 3))
    return Image.fromarray((smooth + noise).astype(np.uint8))


def encode(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    """Encode with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def exif(orientation: int, further: bytes = b"", count: int = 1, order: str = "<") -> bytes:
    """Write EXIF data by hand: Pillow does not write tags of a wrong type."""
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    directory = struct.pack(f"{order}HHHIHH", count, 0x0112, _SHORT, 1, orientation, 0)
    return b"Exif\0\0" + head + directory + further + bytes(4) + struct.pack("<ii", -72, 1)


def with_ascii_resolution(orientation: int) -> bytes:
    """Make EXIF data whose XResolution is text."""
    return exif(orientation, struct.pack("<HHI4s", _X_RESOLUTION, _ASCII, 3, b"72\0\0"), 2)


def with_signed_resolution(orientation: int) -> bytes:
    """Make EXIF data whose XResolution is a negative signed rational."""
    return exif(orientation, struct.pack("<HHII", _X_RESOLUTION, _SIGNED_RATIONAL, 1, 38), 2)


def with_scans(scans: int, side_px: int) -> bytes:
    """Make a progressive JPEG, gray, that repeats its last scan until it has so many."""
    encoded = encode(Image.new("L", (side_px, side_px), 200), "JPEG", progressive=True)
    last = encoded.rindex(b"\xff\xda")
    # The tables of a scan stand in front of it.
    table = encoded.rindex(b"\xff\xc4", 0, last)
    repeated = encoded[table:-2]
    before = encoded.count(b"\xff\xda")
    return encoded[:-2] + repeated * (scans - before) + encoded[-2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Make one chunk of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_png_chunks(encoded: bytes, *chunks: bytes) -> bytes:
    """Put chunks behind the header of a PNG."""
    header = 8 + 12 + 13
    return encoded[:header] + b"".join(chunks) + encoded[header:]


def with_long_text(size_bytes: int) -> bytes:
    """Make a PNG of 8 x 8 px with a compressed text of that size."""
    text = b"Comment\0\0" + zlib.compress(b"x" * size_bytes)
    return with_png_chunks(encode(photograph(8, 8)), png_chunk(b"zTXt", text))


def awkward(name: str) -> bytes:
    """Make the file of that name in AWKWARD."""
    picture = photograph(24, 32)
    match name:
        case "exif-xresolution-ascii.jpg":
            return encode(picture, "JPEG", exif=with_ascii_resolution(6))
        case "exif-signed-rational.jpg":
            return encode(picture, "JPEG", exif=with_signed_resolution(6))
        case "thin-1x8000.png":
            return encode(Image.new("RGB", (1, 8000)))
        case "jpeg-600-scans.jpg":
            return with_scans(600, 16)
        case "tiff-named.jpg":
            return encode(picture, "TIFF")
        case "avif-named.jpg":
            return encode(picture, "AVIF")
        case "eps-named.jpg":
            return encode(picture, "EPS")
        case "png-ztxt-1.1MB.png":
            return with_long_text(1_100_000)
    raise KeyError(name)
