"""The payloads of the load generator."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from convoy.client import ModelStatus
from convoy.client.bench import BenchError
from convoy.client.bench.payload import (
    INFER,
    TensorSpec,
    choose_input,
    encoded_payload,
    raw_payload,
    tensor_payload,
)
from convoy.oip.v2 import inference_pb2
from convoy.v1 import classifier_pb2 as pb

PIXELS = TensorSpec("image", "UINT8", (-1, 4, 6, 3))
FILES = TensorSpec("encoded", "BYTES", (-1,))
SERVED = ModelStatus("m", 3, True, 4, 6, ("a",), "onnx", "cpu", "CPUExecutionProvider", 8)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("L", (13, 17), 200).save(path)
    return path


def inferred(payload):
    assert payload.method == INFER
    return [inference_pb2.ModelInferRequest.FromString(request) for request in payload.requests]


def test_image_files_are_sent_as_they_are(image):
    payload = encoded_payload([image, image], "m", 2)
    for request in map(pb.ClassifyRequest.FromString, payload.requests):
        assert (request.model, request.version, request.encoded) == ("m", 2, image.read_bytes())
    assert payload.request_bytes > len(image.read_bytes())
    with pytest.raises(BenchError, match="expected image files"):
        encoded_payload([], "m", 0)


def test_raw_images_have_the_models_size(image):
    (request,) = map(pb.ClassifyRequest.FromString, raw_payload([image], SERVED).requests)
    assert (request.model, request.version) == ("m", 3)
    assert (request.raw.height, request.raw.width) == (4, 6)
    assert request.raw.pixels == bytes([200]) * 4 * 6 * 3
    random = raw_payload([], SERVED).requests
    assert len(set(random)) == len(random) > 1


@pytest.mark.parametrize("datatype", ["UINT8", "FP32", "INT64", "FP16"])
def test_random_tensors_fit_the_input(datatype):
    spec = TensorSpec("x", datatype, (-1, 2, -1, 3))
    payload = tensor_payload([], spec, 5, "m", "2")
    requests = inferred(payload)
    assert payload.images == 5
    assert len(set(payload.requests)) == len(requests) > 1
    for request in requests:
        (tensor,) = request.inputs
        assert (request.model_name, request.model_version) == ("m", "2")
        assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("x", datatype, [5, 2, 1, 3])


def test_files_become_tensors(image, tmp_path):
    (request,) = inferred(tensor_payload([image], PIXELS, 2, "m", ""))
    assert request.raw_input_contents[0] == bytes([200]) * 2 * 4 * 6 * 3
    (request,) = inferred(tensor_payload([image], FILES, 1, "m", ""))
    assert request.inputs[0].shape == [1]
    assert request.raw_input_contents[0][4:] == image.read_bytes()
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    for number, row in enumerate(rows):
        np.save(tmp_path / f"{number}.npy", row)
    files = sorted(tmp_path.glob("*.npy"))
    first, second = inferred(tensor_payload(files, TensorSpec("x", "FP32", (-1, 3)), 2, "m", ""))
    assert first.raw_input_contents[0] == rows.tobytes()
    assert second.raw_input_contents[0] == rows[::-1].tobytes()


def test_files_that_do_not_fit_are_rejected(image, tmp_path):
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((3, 3)))
    with pytest.raises(BenchError, match=r"expected float32 \[3\] for 'x', got float64 \[3, 3\]"):
        tensor_payload([wrong], TensorSpec("x", "FP32", (-1, 3)), 1, "m", "")
    with pytest.raises(BenchError, match=r"takes FP32 \[3\]"):
        tensor_payload([image], TensorSpec("x", "FP32", (-1, 3)), 1, "m", "")
    with pytest.raises(BenchError, match=r"wrong\.npy"):
        raw_payload([wrong], SERVED)
    with pytest.raises(BenchError, match="No such file"):
        tensor_payload([tmp_path / "no.png"], FILES, 1, "m", "")
    with pytest.raises(BenchError, match="expected image files"):
        tensor_payload([], FILES, 1, "m", "")


def test_an_input_is_chosen_by_what_is_sent():
    inputs = [
        SimpleNamespace(name=s.name, datatype=s.datatype, shape=s.shape) for s in (PIXELS, FILES)
    ]
    assert choose_input(inputs, encoded=False) == PIXELS
    assert choose_input(inputs, encoded=True) == FILES
    with pytest.raises(BenchError, match="one BYTES input for encoded images, got image UINT8"):
        choose_input(inputs[:1], encoded=True)


def test_an_input_is_read_from_text():
    assert TensorSpec.parse("a:b:fp32:-1,3") == TensorSpec("a:b", "FP32", (-1, 3))
    for text in ("x", "x:FP32", "x:FP32:a", "x:FP32:"):
        with pytest.raises(BenchError, match="NAME:DATATYPE"):
            TensorSpec.parse(text)
