"""Ten thousand requests and images that are wrong in some way: each is answered, none by INTERNAL.

The servicers are asked without a network; what may go wrong below is for the transport's tests.
"""

import io
import random
import struct
import warnings
from collections import Counter
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from PIL import Image

from convoy.oip.v2 import inference_pb2 as pb
from convoy.server.errors import InvalidRequestError
from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation, Preprocessing
from convoy.v1 import classifier_pb2
from tests.server.conftest import HEIGHT, WIDTH
from tests.server.inprocess import AbortedError, Context, Servicers, servicers

MESSAGES = 6000
FILES = 6000
# Codes that tell the caller what is wrong with the request, and success.
HARMLESS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
STEPS = Preprocessing(HEIGHT, WIDTH, 0, Interpolation.BILINEAR)


def damaged(encoded: bytes, chance: random.Random) -> bytes:
    """Overwrites, cuts, doubles or drops some bytes."""
    data = bytearray(encoded)
    for _ in range(chance.randrange(1, 5)):
        if not data:
            break
        start = chance.randrange(len(data))
        stop = min(len(data), start + chance.randrange(1, 9))
        match chance.randrange(5):
            case 0:
                data[start] = chance.randrange(256)
            case 1:
                data[start:stop] = chance.randbytes(stop - start)
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = data[start:stop]
            case _:
                del data[stop:]
    return bytes(data)


def files() -> list[bytes]:
    """One file of each kind that is promised."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    picture = Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    turned = Image.Exif()
    turned[0x0112] = 6
    saved = [
        (picture, "JPEG", {"exif": turned.tobytes()}),
        (picture, "JPEG", {"progressive": True}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "PNG", {}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.quantize(16), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (picture, "WEBP", {}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "BMP", {}),
        (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}),
    ]
    encoded = []
    for image, format_, options in saved:
        buffer = io.BytesIO()
        image.save(buffer, format_, **options)
        encoded.append(buffer.getvalue())
    return encoded


def infer_messages() -> list[bytes]:
    """Requests of each form that ModelInfer takes."""
    pixels = bytes(2 * HEIGHT * WIDTH * 3)
    tensor = {"name": "image", "datatype": "UINT8", "shape": (2, HEIGHT, WIDTH, 3)}
    raw = pb.ModelInferRequest(
        model_name="colors", id="7", inputs=[tensor], raw_input_contents=[pixels]
    )
    typed = pb.ModelInferRequest(
        model_name="colors", inputs=[{**tensor, "contents": {"uint_contents": list(pixels)}}]
    )
    classes = pb.ModelInferRequest()
    classes.CopyFrom(raw)
    output = classes.outputs.add(name="logits")
    output.parameters["classification"].int64_param = 2
    classes.parameters["priority"].uint64_param = 1
    file = files()[3]
    encoded = pb.ModelInferRequest(
        model_name="colors",
        inputs=[{"name": "image", "datatype": "BYTES", "shape": [1]}],
        raw_input_contents=[struct.pack("<I", len(file)) + file],
    )
    return [message.SerializeToString() for message in (raw, typed, classes, encoded)]


async def _status(answer: Callable[[], object]) -> grpc.StatusCode:
    try:
        await answer()
    except AbortedError as error:
        return error.code
    return grpc.StatusCode.OK


async def _ask_all(served: Servicers, chance: random.Random) -> Counter[grpc.StatusCode]:
    codes: Counter[grpc.StatusCode] = Counter()
    messages, pictures = infer_messages(), files()
    for number in range(MESSAGES):
        if number % 4:
            message = damaged(chance.choice(messages), chance)
            code = await _status(lambda m=message: served.inference.ModelInfer(m, Context()))
        else:
            request = classifier_pb2.ClassifyRequest(
                model=chance.choice(["", "colors", "cats"]),
                version=chance.choice([0, 1, 2**32 - 1]),
                encoded=damaged(chance.choice(pictures), chance),
                top_k=chance.choice([0, 1, 2**32 - 1]),
                priority=chance.choice([0, 1, 2**32 - 1]),
            )
            code = await _status(lambda r=request: served.classifier.Classify(r, Context()))
        codes[code] += 1
    return codes


async def test_no_mutated_request_is_answered_by_internal(publish):
    async with servicers(publish()) as served:
        codes = await _ask_all(served, random.Random(0))
        assert set(codes) <= HARMLESS, codes
        assert sum(codes.values()) == MESSAGES
        # The mutations reach both ends: some change nothing that matters, most do.
        assert codes[grpc.StatusCode.OK] > MESSAGES // 20
        assert codes[grpc.StatusCode.INVALID_ARGUMENT] > MESSAGES // 4
        whole = infer_messages()[0]
        reply = await served.inference.ModelInfer(whole, Context())
        assert pb.ModelInferResponse.FromString(reply).id == "7"


@pytest.mark.filterwarnings("ignore")
def test_every_mutated_file_is_decoded_or_rejected():
    chance = random.Random(1)
    originals = files()
    decoded = 0
    messages = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(FILES):
            try:
                pixels = decode_image(
                    damaged(chance.choice(originals), chance), STEPS, max_pixels=1_000_000
                )
            except InvalidRequestError as error:
                messages.append(str(error))
            else:
                decoded += 1
                assert pixels.shape == (1, HEIGHT, WIDTH, 3)
                assert pixels.dtype == np.uint8
    assert decoded + len(messages) == FILES
    assert all(message.startswith("image: expected") for message in messages)
    assert min(decoded, len(messages)) > FILES // 20
