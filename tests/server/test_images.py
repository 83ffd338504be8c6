import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from server.errors import InvalidRequestError
from server.images import decode_image
from server.manifest import Interpolation, Preprocessing

PLAIN = Preprocessing(8, 12, 0, Interpolation.BILINEAR)


def gradient(height: int = 8, width: int = 12) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, rows + columns], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def decode(encoded: bytes, steps: Preprocessing = PLAIN) -> np.ndarray:
    return decode_image(encoded, steps, max_pixels=1_000_000)[0]


@pytest.mark.parametrize(
    ("format_", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_a_lossless_image_of_the_right_size_keeps_every_pixel(format_, options):
    pixels = decode(encode(gradient(), format_, **options))
    np.testing.assert_array_equal(pixels, np.asarray(gradient()))


def test_a_jpeg_is_decoded_as_pillow_does():
    encoded = encode(gradient(), "JPEG", quality=90)
    np.testing.assert_array_equal(decode(encoded), np.asarray(Image.open(io.BytesIO(encoded))))


def test_the_first_frame_of_a_gif_counts():
    red, blue = Image.new("RGB", (12, 8), "red"), Image.new("RGB", (12, 8), "blue")
    animation = encode(red, "GIF", save_all=True, append_images=[blue])
    assert (decode(animation) == [255, 0, 0]).all()


def test_grey_palette_and_cmyk_become_rgb():
    grey = decode(encode(gradient().convert("L")))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == np.asarray(gradient().convert("L"))).all()
    palette = gradient().quantize(16)
    np.testing.assert_array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    cmyk = decode(encode(Image.new("CMYK", (12, 8), (0, 255, 255, 0)), "JPEG"))
    assert abs(cmyk.astype(int) - [255, 0, 0]).max() <= 8


def test_transparent_pixels_lie_over_black():
    image = Image.new("RGBA", (12, 8), (200, 100, 50, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    pixels = decode(encode(image))
    assert pixels[0, 0].tolist() == [200, 100, 50]
    assert pixels[1:].max() == 0


def test_the_exif_orientation_is_applied():
    image = gradient(12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = decode(encode(image, exif=exif.tobytes()))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


def test_resizing_to_the_exact_size():
    image = gradient(30, 50)
    expected = image.resize((12, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(encode(image)), np.asarray(expected))


def test_resizing_the_shorter_side_then_cropping_the_centre():
    steps = Preprocessing(8, 8, 10, Interpolation.BICUBIC)
    image = gradient(33, 47)
    # 47 * 10 / 33 = 14.24, rounded to 14; the crop's corner is (3, 1).
    expected = image.resize((14, 10), Image.Resampling.BICUBIC).crop((3, 1, 11, 9))
    np.testing.assert_array_equal(decode(encode(image), steps), np.asarray(expected))


@pytest.mark.parametrize("encoded", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7"])
def test_what_is_no_image_is_refused(encoded):
    with pytest.raises(InvalidRequestError, match=r"^image: expected"):
        decode(encoded)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_image_is_refused(format_):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    encoded = encode(Image.fromarray(noise), format_)
    with pytest.raises(InvalidRequestError, match=r"^image: expected"):
        decode(encoded[: len(encoded) // 2])


def test_formats_beyond_those_promised_are_refused():
    with pytest.raises(InvalidRequestError, match="expected a JPEG, PNG, WEBP, BMP, GIF file"):
        decode(encode(gradient(), "TIFF"))


def test_too_many_pixels_are_refused_before_they_are_decoded():
    encoded = encode(Image.new("1", (2000, 2000)))
    with pytest.raises(InvalidRequestError, match="at most 1000000 pixels, got 2000 x 2000"):
        decode(encoded)


def test_of_sixteen_bit_grey_the_high_byte_counts():
    deep = np.linspace(0, 65535, 8 * 12).astype(np.uint16).reshape(8, 12)
    pixels = decode(encode(Image.fromarray(deep)))
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8)[..., np.newaxis], 3, axis=2))


def test_palette_transparency_lies_over_black():
    palette = gradient().quantize(16)
    pixels = decode(encode(palette, transparency=palette.getpixel((0, 0))))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels.max() > 0


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_bomb_of_any_format_is_refused_without_the_memory_for_it(format_):
    """A process of its own tells what it took at most."""
    side = 8000
    options = {"lossless": True} if format_ == "WEBP" else {}
    mode = "RGB" if format_ == "WEBP" else "L"
    bomb = encode(Image.new(mode, (side, side)), format_, **options)
    program = """
import resource, sys
from server.errors import InvalidRequestError
from server.images import decode_image
from server.manifest import Interpolation, Preprocessing
encoded = sys.stdin.buffer.read()
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(encoded, Preprocessing(8, 8, 0, Interpolation.BILINEAR), 1_000_000)
except InvalidRequestError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib, error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], input=bomb, capture_output=True, timeout=60, check=True
    )
    grown_kib, message = result.stdout.decode().split(" ", 1)
    assert f"at most 1000000 pixels, got {side} x {side}" in message
    # Its pixels would take 62,500 KiB and more; the file itself is copied once or twice.
    assert int(grown_kib) < 30_000 + 3 * len(bomb) / 1024
