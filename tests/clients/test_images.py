"""The forms in which an image may be passed to a client; a real server answers."""

import io
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from convoy.client import (
    AsyncClient,
    Classification,
    Client,
    ImageError,
    InvalidRequestError,
    images,
)

ORIENTATION = 0x0112
CASES = Path(__file__).parents[3] / "shared" / "cases"


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Has no symmetry: each orientation of it is another image."""
    y, x = np.mgrid[0:120, 0:180].astype(np.float32)
    channels = [x, y * 2, (x * y) % 251]
    pixels = np.stack([channel % 256 for channel in channels], axis=2).astype(np.uint8)
    pixels[:40, :60] = 0
    return Image.fromarray(pixels)


def answers_of(client: Client, path: Path) -> set:
    """The server's answers for a file and for the image that Pillow opens from it."""
    with Image.open(path) as opened:
        forms = (path, opened)
        return {client.classify(form, top_k=10).classes for form in forms}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_pil_image_is_applied(client, photograph, tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.jpg"
    photograph.save(path, exif=exif, quality=95)
    assert len(answers_of(client, path)) == 1


def test_the_orientation_makes_a_difference(client, photograph, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photograph.save(tmp_path / "turned.jpg", exif=exif)
    photograph.save(tmp_path / "plain.jpg")
    turned, plain = (client.classify(tmp_path / f"{n}.jpg").classes for n in ("turned", "plain"))
    assert turned != plain


def test_another_exif_tag_of_a_wrong_type_does_not_matter(client, photograph):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    photograph.save(buffer, "JPEG", exif=exif)
    # XResolution, a rational, as ASCII: Pillow cannot write such a block again.
    entry = b"\x1a\x01\x02\x00\x03\x00\x00\x0072\x00\x00"
    orientation = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    block = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00" + orientation + entry + bytes(4)
    content = buffer.getvalue()
    start = content.index(b"\xff\xe1")
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    malformed = content[:start] + segment + content[start + 2 + length :]
    opened = Image.open(io.BytesIO(malformed))
    assert opened.getexif()[ORIENTATION] == 6
    assert client.classify(opened, top_k=10) is not None
    turned = client.classify(buffer.getvalue(), top_k=10)
    assert client.classify(opened, top_k=10).classes == turned.classes


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGB", "bmp"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("I;16", "png"),
    ],
)
def test_each_mode_is_as_in_the_file(client, photograph, tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        pixels = np.asarray(photograph)[:, :, 0].astype(np.uint16) * 257
        Image.fromarray(pixels).save(path)
    else:
        image = photograph.convert("RGBA")
        image.putalpha(photograph.getchannel(1))
        image.convert(mode).save(path)
    assert len(answers_of(client, path)) == 1


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "I", "F", "RGBa", "La", "PA", "RGBX"])
def test_modes_that_no_file_has_are_classified(client, photograph, mode):
    via = {"LAB": "RGB", "RGBa": "RGBA", "La": "LA"}.get(mode, "RGB")
    if mode == "LAB":
        image = Image.new("LAB", (40, 40), (120, 130, 140))
    elif mode == "PA":
        image = photograph.convert("LA").convert("PA")
    else:
        image = photograph.convert(via).convert(mode)
    assert isinstance(client.classify(image), Classification)


class HasPath(os.PathLike):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_the_same_image_in_every_form(client, photograph, tmp_path):
    path = tmp_path / "image.png"
    photograph.save(path)
    content = path.read_bytes()
    forms = [
        path,
        str(path),
        HasPath(path),
        f"file://{path}",
        content,
        bytearray(content),
        memoryview(content),
        io.BytesIO(content),
        path.open("rb"),
        photograph,
    ]
    assert len({client.classify(form, top_k=10).classes for form in forms}) == 1
    forms[8].close()


def test_an_image_by_http(client, photograph, tmp_path):
    photograph.save(tmp_path / "image.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = Thread(target=web.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{web.server_port}"
            found = client.classify(f"{url}/image.png", top_k=10)
            with pytest.raises(ImageError, match=r"missing\.png"):
                client.classify(f"{url}/missing.png")
        finally:
            web.shutdown()
            thread.join()
    assert found.classes == client.classify(tmp_path / "image.png", top_k=10).classes


def test_a_file_above_the_limit_is_not_read(client, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "large.png"
    path.write_bytes(bytes(1001))
    with pytest.raises(ImageError, match=r"^image: expected at most 1000 bytes, got 1001$"):
        client.classify(path)
    with pytest.raises(ImageError, match=r"large\.png: expected at most 1000 bytes, got more$"):
        client.classify(f"file://{path}")


def test_an_error_shows_a_url_without_its_password_and_query(client):
    with pytest.raises(ImageError) as raised:
        client.classify("http://someone:pass-word@127.0.0.1:1/image.png?sig=a1b2")
    assert str(raised.value).startswith("http://127.0.0.1:1/image.png: ")
    assert not any(secret in str(raised.value) for secret in ("someone", "pass-word", "a1b2"))


def test_arrays_and_tensors_are_the_same_pixels(client, photograph):
    pixels = np.asarray(photograph.resize((32, 32)))
    forms = [
        pixels,
        torch.from_numpy(pixels.copy()),
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        np.asfortranarray(pixels),
    ]
    assert len({client.classify(form, top_k=10).classes for form in forms}) == 1


class Explosive:
    def read(self) -> bytes:
        raise ZeroDivisionError("boom")


WRONG = [
    (None, "NoneType"),
    (7, "int"),
    ({"a": 1}, "dict"),
    ([1, 2], "list"),
    (object(), "object"),
    (io.StringIO("text"), "binary file.* str"),
    (Explosive(), "ZeroDivisionError: boom"),
    (torch.zeros(3, 32, 32), "float32"),
    ("nothing://there", "nothing"),
    (np.zeros((2, 2), np.uint8), r"\[2, 2\]"),
]


@pytest.mark.parametrize(("image", "message"), WRONG)
def test_anything_else_is_an_error_that_names_the_type(client, image, message):
    with pytest.raises(ImageError, match=message):
        client.classify(image)


def test_a_damaged_pil_image_is_an_error(client, photograph):
    buffer = io.BytesIO()
    photograph.save(buffer, "PNG")
    opened = Image.open(io.BytesIO(buffer.getvalue()[:2000]))
    with pytest.raises(ImageError, match="image: "):
        client.classify(opened)


@pytest.mark.parametrize("stream", [False, True])
def test_many_images_lose_no_answer_to_one_that_raises(client, photograph, stream):
    images = [image for wrong, _ in WRONG for image in (photograph, wrong)]
    answers = list(client.classify_many(images, in_flight=4, stream=stream))
    assert len(answers) == len(images)
    for answer, wrong in zip(answers, [False, True] * len(WRONG), strict=True):
        assert isinstance(answer, ImageError if wrong else Classification)


def raising_after(count: int, image: object):
    for _ in range(count):
        yield image
    raise RuntimeError("the source is broken")


@pytest.mark.parametrize("stream", [False, True])
def test_a_source_that_raises_does_so_after_the_answers_before(client, photograph, stream):
    answers = client.classify_many(raising_after(7, photograph), stream=stream)
    assert [type(next(answers)) for _ in range(7)] == [Classification] * 7
    with pytest.raises(RuntimeError, match="the source is broken"):
        next(answers)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_holds_in_asyncio(server, photograph, stream):
    images = [photograph, None, b"no image", Explosive(), photograph]
    async with AsyncClient(server.address) as client:
        answers = [answer async for answer in client.classify_many(images, stream=stream)]
        kinds = [Classification, ImageError, InvalidRequestError, ImageError, Classification]
        assert [type(answer) for answer in answers] == kinds
        answers = client.classify_many(raising_after(7, photograph), stream=stream)
        assert [type(await anext(answers)) for _ in range(7)] == [Classification] * 7
        with pytest.raises(RuntimeError, match="the source is broken"):
            await anext(answers)


def test_the_reported_photograph(client):
    path = CASES / "batch" / "rot.jpg"
    if not path.exists():
        pytest.skip("the shared cases are not beside this checkout")
    assert len(answers_of(client, path)) == 1
