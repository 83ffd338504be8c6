import struct

import numpy as np
import pytest

from convoy.server.errors import InvalidRequestError
from convoy.server.models.manifest import Manifest
from convoy.server.models.repository import read_manifest
from convoy.server.protocol.tensors import InputTensor, images_of
from tests.server.conftest import HEIGHT, WIDTH

SHAPE = (2, HEIGHT, WIDTH, 3)
COUNT = 2 * HEIGHT * WIDTH * 3
RAW = bytes(range(COUNT))


@pytest.fixture
def manifest(publish) -> Manifest:
    return read_manifest(publish())


def prefixed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def images(manifest: Manifest, *inputs: InputTensor) -> object:
    return images_of(inputs, manifest, max_images=4)


@pytest.mark.parametrize("data", [RAW, memoryview(RAW), list(RAW)])
def test_pixels_come_raw_or_as_elements(manifest, data):
    pixels = images(manifest, InputTensor("image", "UINT8", SHAPE, data))
    np.testing.assert_array_equal(pixels, np.frombuffer(RAW, np.uint8).reshape(SHAPE))


def test_raw_pixels_are_a_view_of_the_message(manifest):
    pixels = images(manifest, InputTensor("image", "UINT8", SHAPE, RAW))
    assert np.shares_memory(pixels, np.frombuffer(RAW, np.uint8))


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize(
    "data", [[b"one", b""], prefixed(b"one", b""), memoryview(prefixed(b"one", b""))]
)
def test_image_files_come_raw_or_as_elements(manifest, data, shape):
    assert images(manifest, InputTensor("image", "BYTES", shape, data)) == (b"one", b"")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (InputTensor("x", "UINT8", SHAPE, RAW), r"inputs\[0\].name: expected 'image', got 'x'"),
        (InputTensor("image", "FP32", SHAPE, RAW), "datatype: expected UINT8 .* BYTES .* 'FP32'"),
        (InputTensor("image", "UINT8", (HEIGHT, WIDTH, 3), RAW), r"expected \[-1, 4, 6, 3\]"),
        (InputTensor("image", "UINT8", (0, HEIGHT, WIDTH, 3), b""), "at least one image"),
        (InputTensor("image", "UINT8", (-1, HEIGHT, WIDTH, 3), b""), "at least one image"),
        (InputTensor("image", "UINT8", (5, HEIGHT, WIDTH, 3), RAW), "1 to 4 images, got 5"),
        (InputTensor("image", "UINT8", SHAPE, RAW[1:]), "expected 144 bytes, got 143"),
        (InputTensor("image", "UINT8", SHAPE, [1, 2]), "expected 144 values, got 2"),
        (InputTensor("image", "UINT8", SHAPE, [256] * COUNT), "whole numbers from 0 to 255"),
        (InputTensor("image", "UINT8", SHAPE, [-1] * COUNT), "whole numbers from 0 to 255"),
        (InputTensor("image", "UINT8", SHAPE, [0.5] * COUNT), "whole numbers from 0 to 255"),
        (InputTensor("image", "UINT8", SHAPE, [b"x"] * COUNT), "whole numbers from 0 to 255"),
        (InputTensor("image", "BYTES", (), b""), r"expected \[-1\] with at least one image"),
        (InputTensor("image", "BYTES", (0,), b""), "at least one image"),
        (InputTensor("image", "BYTES", (1, 2), b""), r"expected \[-1\]"),
        (InputTensor("image", "BYTES", (5,), b""), "1 to 4 images, got 5"),
        (InputTensor("image", "BYTES", (2,), prefixed(b"a")), "expected 2 elements, .* got 1"),
        (InputTensor("image", "BYTES", (1,), prefixed(b"a", b"b")), "expected 5 bytes, got 10"),
        (
            InputTensor("image", "BYTES", (1,), b"\x09\0\0\0ab"),
            "element 0: expected 9 bytes, got 2",
        ),
        (
            InputTensor("image", "BYTES", (1,), b"\xff\xff\xff\xffab"),
            "element 0: expected 42949672",
        ),
        (InputTensor("image", "BYTES", (1,), b"\x09\0"), "expected 1 elements, .* got 0"),
        (InputTensor("image", "BYTES", (2,), [b"a"]), "expected 2 elements, got 1"),
        (InputTensor("image", "BYTES", (1,), [7]), "expected 1 elements, got 0"),
    ],
)
def test_an_invalid_tensor_gets_the_reason(manifest, tensor, message):
    with pytest.raises(InvalidRequestError, match=message):
        images(manifest, tensor)


@pytest.mark.parametrize("count", [0, 2])
def test_a_model_has_one_input(manifest, count):
    tensor = InputTensor("image", "UINT8", SHAPE, RAW)
    with pytest.raises(InvalidRequestError, match=f"1 tensor named 'image', got {count}"):
        images(manifest, *[tensor] * count)
