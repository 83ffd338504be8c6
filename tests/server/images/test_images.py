import io
import subprocess
import sys
import time
import zlib
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from convoy.server.errors import InvalidRequestError
from convoy.server.images import image_file
from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation, Preprocessing
from tests.image_files import encode, exif, png_chunk, with_png_chunks, with_scans

PLAIN = Preprocessing(8, 12, 0, Interpolation.BILINEAR)


def gradient(height: int = 8, width: int = 12) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, rows + columns], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


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


def test_gray_palette_and_cmyk_become_rgb():
    gray = decode(encode(gradient().convert("L")))
    assert (gray[..., 0] == gray[..., 1]).all()
    assert (gray[..., 0] == np.asarray(gradient().convert("L"))).all()
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


def test_resizing_the_shorter_side_then_cropping_the_center():
    steps = Preprocessing(8, 8, 10, Interpolation.BICUBIC)
    image = gradient(33, 47)
    # 47 * 10 / 33 = 14.24, rounded to 14; the crop's corner is (3, 1).
    expected = image.resize((14, 10), Image.Resampling.BICUBIC).crop((3, 1, 11, 9))
    np.testing.assert_array_equal(decode(encode(image), steps), np.asarray(expected))


@pytest.mark.parametrize("encoded", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7"])
def test_what_is_no_image_is_rejected(encoded):
    with pytest.raises(InvalidRequestError, match=r"^image: expected"):
        decode(encoded)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_image_is_rejected(format_):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    encoded = encode(Image.fromarray(noise), format_)
    with pytest.raises(InvalidRequestError, match=r"^image: expected"):
        decode(encoded[: len(encoded) // 2])


def test_formats_beyond_those_promised_are_rejected():
    with pytest.raises(InvalidRequestError, match="expected a JPEG, PNG, WEBP, BMP, GIF file"):
        decode(encode(gradient(), "TIFF"))


def test_too_many_pixels_are_rejected_before_they_are_decoded():
    encoded = encode(Image.new("1", (2000, 2000)))
    with pytest.raises(InvalidRequestError, match="at most 1000000 pixels, got 2000 x 2000"):
        decode(encoded)


def test_sixteen_bit_gray_keeps_the_high_byte():
    deep = np.linspace(0, 65535, 8 * 12).astype(np.uint16).reshape(8, 12)
    pixels = decode(encode(Image.fromarray(deep)))
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8)[..., np.newaxis], 3, axis=2))


def test_palette_transparency_becomes_black():
    palette = gradient().quantize(16)
    pixels = decode(encode(palette, transparency=palette.getpixel((0, 0))))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels.max() > 0


def measured(program: str, encoded: bytes) -> tuple[int, str]:
    """Run a program in a process of its own; returns by how many bytes it grew, and its output.

    The program finds the file in `encoded`, and what it grew by counts from there on.
    """
    frame = f"""
import resource, sys
from convoy.server.errors import InvalidRequestError, OverloadedError
from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation, Preprocessing
encoded = sys.stdin.buffer.read()
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{program}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
"""
    result = subprocess.run(
        [sys.executable, "-c", frame], input=encoded, capture_output=True, timeout=300, check=True
    )
    *lines, grown_kib = result.stdout.decode().splitlines()
    return int(grown_kib) * 1024, "\n".join(lines)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_bomb_of_any_format_is_rejected_without_the_memory_for_it(format_):
    side = 8000
    options = {"lossless": True} if format_ == "WEBP" else {}
    mode = "RGB" if format_ == "WEBP" else "L"
    bomb = encode(Image.new(mode, (side, side)), format_, **options)
    program = """
try:
    decode_image(encoded, Preprocessing(8, 8, 0, Interpolation.BILINEAR), 1_000_000)
except InvalidRequestError as error:
    print(error)
"""
    grown_bytes, message = measured(program, bomb)
    assert f"at most 1000000 pixels, got {side} x {side}" in message
    # Its pixels would take 64 MB and more; the file itself is copied once or twice.
    assert grown_bytes < 31_000_000 + 3 * len(bomb)


# What docs/serving.md promises.
BYTES_A_PIXEL = {"JPEG": 12, "PNG": 8, "WEBP": 16, "BMP": 8, "GIF": 8}
FIXED_BYTES = 32 * 2**20
SIDE_PX = 2500
DECODE = """
steps = Preprocessing(224, 224, 256, Interpolation.BICUBIC)
print(decode_image(encoded, steps, 50_000_000).shape)
"""


def heavy_files() -> dict[str, tuple[Image.Image, str, dict[str, object]]]:
    """What costs the most of each format: turned, transparent, progressive, in odd modes."""
    base = gradient(64, 64).resize((SIDE_PX, SIDE_PX))
    turned = {"exif": exif(6)}
    gray, clear = base.convert("L"), base.copy()
    clear.putalpha(gray)
    gray_clear = gray.copy()
    gray_clear.putalpha(gray)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 200)
    progressive = {"progressive": True, "subsampling": 0, **turned}
    return {
        "jpeg": (base, "JPEG", turned),
        "progressive": (base, "JPEG", progressive),
        "progressive cmyk": (base.convert("CMYK"), "JPEG", progressive),
        "rgb": (base, "PNG", turned),
        "rgba": (clear, "PNG", turned),
        "la": (gray_clear, "PNG", turned),
        "palette": (base.quantize(16), "PNG", {"transparency": 3, **turned}),
        "one transparent color": (base, "PNG", {"transparency": (1, 2, 3), **turned}),
        "16 bits": (deep, "PNG", turned),
        "1 bit": (base.convert("1"), "PNG", turned),
        "webp": (base, "WEBP", {"method": 0, **turned}),
        "lossless webp": (base, "WEBP", {"lossless": True, "method": 0, "quality": 0, **turned}),
        "transparent webp": (clear, "WEBP", {"method": 0, **turned}),
        "bmp": (base, "BMP", {}),
        "gif": (base.quantize(16), "GIF", {"transparency": 3}),
    }


@pytest.mark.slow
def test_the_memory_of_a_decode_is_what_the_documentation_says():
    over = {}
    for name, (image, format_, options) in heavy_files().items():
        encoded = encode(image, format_, **options)
        grown_bytes, _ = measured(DECODE, encoded)
        limit = BYTES_A_PIXEL[format_] * SIDE_PX**2 + 2 * len(encoded) + FIXED_BYTES
        if grown_bytes > limit:
            over[name] = (grown_bytes, limit)
    assert not over


@pytest.mark.parametrize("size_px", [(1, 8000), (8000, 1), (1, 65_535), (65_535, 1)])
@pytest.mark.parametrize("shorter_px", [0, 256])
def test_a_thin_image_takes_no_more_memory_than_another(size_px, shorter_px):
    encoded = encode(Image.new("RGB", size_px, (10, 20, 30)))
    program = DECODE.replace("256", str(shorter_px)) + (
        "print(decode_image(encoded, steps, 50_000_000).reshape(-1, 3).max(0))"
    )
    grown_bytes, output = measured(program, encoded)
    assert output == "(1, 224, 224, 3)\n[10 20 30]"
    assert grown_bytes < FIXED_BYTES


def test_a_side_beyond_the_limit_is_rejected():
    with pytest.raises(InvalidRequestError, match="sides of at most 65535 px, got 1 x 65536"):
        decode(encode(Image.new("RGB", (1, 65_536))))


@pytest.mark.slow
@pytest.mark.parametrize("room_mib", [32, 64, 128])
@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 1}),
    ],
)
def test_without_memory_for_the_pixels_the_server_is_overloaded(format_, options, room_mib):
    encoded = encode(Image.new("RGB", (4000, 4000)), format_, **options)
    program = f"""
from PIL import Image
Image.init()
limit = {room_mib} * 2**20 + 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    decode_image(encoded, Preprocessing(8, 8, 0, Interpolation.BILINEAR), 50_000_000)
except OverloadedError as error:
    print(error)
try:
    decode_image(encoded, Preprocessing(8, 8, 0, Interpolation.BILINEAR), 1_000)
except InvalidRequestError as error:
    print(error)
"""
    _, output = measured(program, encoded)
    assert output.splitlines() == [
        "image: not enough memory to decode it at the moment",
        "image: expected at most 1000 pixels, got 4000 x 4000",
    ]


@pytest.mark.parametrize("shorter_px", [0, 256])
@pytest.mark.parametrize("size_px", [(30, 6000), (6000, 30), (9, 21_000)])
def test_the_center_of_a_huge_resize_is_that_of_the_whole_one(size_px, shorter_px):
    noise = np.random.default_rng(0).integers(0, 256, (size_px[1], size_px[0], 3), np.uint8)
    image = Image.fromarray(noise)
    scale = shorter_px / min(size_px)
    resized_px = (round(size_px[0] * scale), round(size_px[1] * scale)) if scale else (224, 224)
    whole = image.resize(resized_px, Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in resized_px)
    expected = np.asarray(whole.crop((left, top, left + 224, top + 224)))
    found = decode(encode(image), Preprocessing(224, 224, shorter_px, Interpolation.BILINEAR))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_crop_beyond_a_huge_resize_has_a_black_border():
    image = Image.new("RGB", (4, 60_000), (9, 9, 9))
    found = decode(encode(image), Preprocessing(40, 300, 200, Interpolation.BILINEAR))
    assert (found[:, 50:250] == 9).all()
    assert found[:, :50].max() == found[:, 250:].max() == 0


def test_transparency_is_the_same_in_strips_as_at_once():
    image = gradient(1100, 900).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    expected = Image.alpha_composite(black, image).convert("RGB")
    found = decode(encode(image), Preprocessing(1100, 900, 0, Interpolation.BILINEAR))
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("scans", [500, 501])
def test_a_jpeg_may_have_500_scans(scans):
    encoded = with_scans(scans, 16)
    if scans == 500:
        assert decode(encoded).shape == (8, 12, 3)
    else:
        with pytest.raises(InvalidRequestError, match="expected a JPEG of at most 500 scans"):
            decode(encoded)


def test_scans_in_thumbnails_and_comments_do_not_count():
    comments = b"\xff\xda" * 600
    encoded = encode(gradient(), "JPEG", comment=comments)
    exif_ = b"\xff\xe1" + (2 + 6 + len(comments)).to_bytes(2) + b"Exif\0\0" + comments
    found = decode(encoded[:2] + exif_ + encoded[2:])
    np.testing.assert_array_equal(found, decode(encode(gradient(), "JPEG")))


def test_scans_cannot_hide_in_the_length_of_a_marker_without_one():
    encoded = with_scans(600, 16)
    first = encoded.index(b"\xff\xda")
    second = encoded.index(b"\xff\xc4", first)
    hidden = encoded[:second] + b"\xff\x02\xff\xff" + encoded[second:]
    with pytest.raises(InvalidRequestError, match="expected a JPEG of at most 500 scans"):
        decode(hidden)


def test_a_file_may_take_ten_seconds_of_processor_time(monkeypatch):
    monkeypatch.setattr(image_file, "MAX_PROCESSOR_S", 0.05)
    started_s = time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"at most 0.05 s of processor time"):
        decode_image(with_scans(480, 4000), PLAIN, 50_000_000)
    # All of its scans would take several seconds.
    assert time.thread_time() - started_s < 1.5


def test_the_time_that_a_process_was_stopped_is_not_processor_time(monkeypatch):
    clock = SimpleNamespace(monotonic=partial(next, count(0, 60)), thread_time=time.thread_time)
    monkeypatch.setattr(image_file, "time", clock)
    assert decode(encode(gradient(), "JPEG")).shape == (8, 12, 3)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_100_000))),
        png_chunk(b"iCCP", b"profile\0\1no"),
        png_chunk(b"tEXt", b"transparency\0text"),
        png_chunk(b"tEXt", b"bbox\0text"),
        png_chunk(b"pHYs", b"\0"),
        png_chunk(b"acTL", b"\0"),
        png_chunk(b"tIME", b"now")[:-1] + b"?",
    ],
)
def test_metadata_of_a_png_never_decides(chunk):
    encoded = encode(gradient())
    np.testing.assert_array_equal(decode(with_png_chunks(encoded, chunk)), decode(encoded))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_each_orientation_is_applied_as_pillow_does(orientation, format_, order):
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = exif(orientation, order=order)
    encoded = encode(gradient(12, 8), format_, exif=data, **options)
    opened = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    steps = Preprocessing(opened.height, opened.width, 0, Interpolation.BILINEAR)
    np.testing.assert_array_equal(decode(encoded, steps), np.asarray(opened))
