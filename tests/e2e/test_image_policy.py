"""Serving, training and batch jobs accept the same image files and see the same pixels."""

import inspect
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convoy.client.image_file
import convoy.server.images.image_file
import convoy.training.data.image_file
from convoy.client.batch.decoding import Preprocessing as BatchSteps
from convoy.client.batch.decoding import decode
from convoy.client.errors import ImageError
from convoy.client.images import classify_request
from convoy.server.errors import InvalidRequestError
from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation
from convoy.server.models.manifest import Preprocessing as ServerSteps
from convoy.training.data.images import Preprocessing as TrainingSteps
from convoy.training.data.images import read_image
from convoy.training.errors import DataError
from tests import image_files
from tests.image_files import encode, photograph

MUTATIONS = 16_000
SIZE = (24, 20, 26)
CASES = Path(__file__).parents[3] / "shared" / "cases" / "images"

Verdict = str | np.ndarray


def verdicts(encoded: bytes, path: Path, size: tuple[int, int, int] = SIZE) -> list[Verdict]:
    """Ask serving, training and batch for the pixels, or for the reason why there are none."""
    path.write_bytes(encoded)
    return [_served(encoded, size), _trained(path, size), _batched(encoded, size)]


def _served(encoded: bytes, size: tuple[int, int, int]) -> Verdict:
    steps = ServerSteps(*size, Interpolation.BILINEAR)
    try:
        return decode_image(encoded, steps, 50_000_000)[0]
    except InvalidRequestError as error:
        return str(error).removeprefix("image: ")


def _trained(path: Path, size: tuple[int, int, int]) -> Verdict:
    try:
        return read_image(path, TrainingSteps(*size))
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")


def _batched(encoded: bytes, size: tuple[int, int, int]) -> Verdict:
    try:
        return decode(encoded, BatchSteps(*size, Image.Resampling.BILINEAR))
    except ImageError as error:
        return str(error).removeprefix("image: ")


def agreed(found: list[Verdict]) -> Verdict:
    """Check that all three say the same, and return it."""
    served, trained, batched = (v if isinstance(v, str) else v.tobytes() for v in found)
    assert served == trained == batched
    return found[0]


def test_the_three_copies_of_the_policy_are_identical():
    parts = (convoy.server.images, convoy.training.data, convoy.client)
    server, training, client = (inspect.getsource(part.image_file) for part in parts)
    assert server == training == client


@pytest.mark.parametrize("name", image_files.AWKWARD)
def test_an_awkward_file_gets_one_verdict(name, tmp_path):
    verdict = agreed(verdicts(image_files.awkward(name), tmp_path / name))
    assert isinstance(verdict, np.ndarray) == image_files.AWKWARD[name], verdict


@pytest.mark.skipif(not CASES.is_dir(), reason="the collected files are not beside this checkout")
@pytest.mark.parametrize("name", image_files.AWKWARD)
def test_a_collected_file_gets_the_verdict_of_the_one_built_here(name, tmp_path):
    verdict = agreed(verdicts((CASES / name).read_bytes(), tmp_path / name))
    assert isinstance(verdict, np.ndarray) == image_files.AWKWARD[name], verdict


@pytest.mark.parametrize("name", ["exif-xresolution-ascii.jpg", "exif-signed-rational.jpg"])
def test_the_orientation_counts_beside_a_tag_of_a_wrong_type(name, tmp_path):
    turned = agreed(verdicts(image_files.awkward(name), tmp_path / name, (32, 24, 0)))
    plain = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def test_an_eps_file_starts_no_program(tmp_path, monkeypatch):
    started = tmp_path / "started"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("gs") == str(ghostscript)
    verdict = agreed(verdicts(image_files.awkward("eps-named.jpg"), tmp_path / "eps.jpg"))
    assert str(verdict).startswith("expected a JPEG, PNG, WEBP, BMP, GIF file, got")
    assert not started.exists()


def _originals() -> Iterator[tuple[bytes, int]]:
    """Yield files, and how much of each is header."""
    photo = photograph(30, 26)
    gray, clear = photo.convert("L"), photo.copy()
    clear.putalpha(gray)
    bare = encode(photo)
    for data in (image_files.with_ascii_resolution(6), image_files.exif(8, order=">")):
        yield encode(photo, "JPEG", exif=data), 220
        yield encode(photo, "PNG", exif=data), 140
        yield encode(photo, "WEBP", exif=data), 60
    yield encode(photo, "JPEG", progressive=True, icc_profile=b"profile", comment=b"note"), 260
    yield encode(photo.convert("CMYK"), "JPEG"), 200
    yield encode(gray, "JPEG", exif=image_files.exif(3)), 160
    yield encode(clear), 60
    yield encode(photo.quantize(8), transparency=2), 120
    yield encode(Image.fromarray(np.asarray(gray).astype(np.uint16) * 200)), 60
    yield encode(photo.quantize(8), "GIF", transparency=1), 100
    yield encode(photo, "BMP"), 60
    text = [
        image_files.png_chunk(b"tEXt", key + b"\0value")
        for key in (b"transparency", b"interlace", b"exif", b"bbox")
    ]
    yield image_files.with_png_chunks(bare, *text), 200
    yield image_files.with_long_text(200), 120


def _mutated(encoded: bytes, header: int, chance: random.Random) -> bytes:
    content = bytearray(encoded)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(min(header, len(content)))
        match chance.randrange(5):
            case 0:
                content[at] = chance.randrange(256)
            case 1:
                content[at] ^= 1 << chance.randrange(8)
            case 2:
                content[at : at + 2] = chance.choice(
                    [b"\0\0", b"\xff\xff", b"\xff\xda", b"\x7f\xff"]
                )
            case 3:
                del content[at : at + chance.randrange(1, 9)]
            case 4:
                content[at:at] = content[at : at + chance.randrange(1, 17)]
    return bytes(content)


def test_mutated_headers_get_one_verdict_and_crash_nothing(tmp_path):
    chance = random.Random(0)
    originals = list(_originals())
    for encoded, _ in originals:
        assert isinstance(agreed(verdicts(encoded, tmp_path / "whole")), np.ndarray)
    counts: Counter[bool] = Counter()
    for number in range(MUTATIONS):
        encoded, header = originals[number % len(originals)]
        verdict = agreed(verdicts(_mutated(encoded, header, chance), tmp_path / "mutated"))
        counts[isinstance(verdict, np.ndarray)] += 1
        if isinstance(verdict, str):
            assert verdict.startswith("expected "), verdict
    assert min(counts.values()) > MUTATIONS // 10, counts


def test_a_sound_photo_with_mutated_exif_data_is_accepted(tmp_path):
    """Whatever the EXIF data says, the pixels are there, in one of the eight orientations."""
    chance = random.Random(1)
    photo = photograph(24, 20)
    for data in (image_files.with_signed_resolution(6), image_files.exif(1, order=">")):
        for format_ in ("JPEG", "PNG", "WEBP"):
            whole = encode(photo, format_, exif=data)
            at = whole.index(data[6:])
            sound = {
                bytes(_batched(encode(photo, format_, exif=image_files.exif(way)), (24, 20, 0)))
                for way in range(1, 9)
            }
            for _ in range(150):
                content = bytearray(whole)
                for _ in range(3):
                    content[at + chance.randrange(len(data) - 6)] = chance.randrange(256)
                verdict = agreed(verdicts(bytes(content), tmp_path / "photo", (24, 20, 0)))
                assert isinstance(verdict, np.ndarray), verdict
                assert verdict.tobytes() in sound


def test_an_opened_picture_is_sent_as_the_server_would_decode_its_file(tmp_path):
    photo = photograph(24, 20)
    clear = photo.copy()
    clear.putalpha(photo.convert("L"))
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 200)
    for encoded in (
        encode(photo, "JPEG", exif=image_files.exif(6)),
        encode(photo, exif=image_files.with_ascii_resolution(8)),
        encode(photo.convert("CMYK"), "JPEG"),
        encode(photo.quantize(8), transparency=2),
        encode(clear),
        encode(deep),
    ):
        path = tmp_path / "picture"
        path.write_bytes(encoded)
        with Image.open(path) as opened:
            request = classify_request(opened, "", 0, 0)
        sent = _served(request.encoded, SIZE)
        assert isinstance(sent, np.ndarray)
        agreed([sent, *verdicts(encoded, path)[:2]])


def test_an_opened_picture_that_is_damaged_is_an_image_error(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(photograph(24, 20), "JPEG")[:-60])
    with Image.open(path) as opened, pytest.raises(ImageError, match=r"^image: "):
        classify_request(opened, "", 0, 0)
