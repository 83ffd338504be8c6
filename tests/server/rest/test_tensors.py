"""Bodies of REST requests, without a server."""

import json

import numpy as np
import pytest

from convoy.server.errors import InvalidRequestError
from convoy.server.protocol.tensors import OutputTensor
from convoy.server.rest.codec import InferBody, read_infer_body, write_infer_body

PIXELS = bytes(range(24))
BINARY = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 4, 3]}


def body(header: object, raw: bytes = b"") -> tuple[bytes, int]:
    text = json.dumps(header).encode()
    return text + raw, len(text)


def with_size(size: object) -> dict[str, object]:
    return {"inputs": [{**BINARY, "parameters": {"binary_data_size": size}}]}


def test_raw_tensors_follow_the_json():
    header = {"id": "a", "parameters": {"timeout": 5}, **with_size(24)}
    request = read_infer_body(*body(header, PIXELS))
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("image", "UINT8", (1, 2, 4, 3))
    assert bytes(tensor.data) == PIXELS
    assert (request.id, request.parameters) == ("a", {"timeout": 5})


@pytest.mark.parametrize("nesting", [(24,), (8, 3), (2, 4, 3), (1, 2, 4, 3)])
def test_data_may_be_flat_or_nested(nesting):
    nested = np.frombuffer(PIXELS, np.uint8).reshape(nesting).tolist()
    request = read_infer_body(body({"inputs": [{**BINARY, "data": nested}]})[0], None)
    assert request.inputs[0].data == list(PIXELS)


def test_strings_are_elements_of_bytes():
    header = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]}]}
    assert read_infer_body(body(header)[0], None).inputs[0].data == [b"a", "é".encode()]


@pytest.mark.parametrize(
    ("header", "raw", "message"),
    [
        (with_size(25), PIXELS, "expected 25 bytes of raw tensors after the JSON, got 24"),
        (with_size(23), PIXELS, "expected 23 bytes of raw tensors after the JSON, got 24"),
        (with_size(-1), PIXELS, "binary_data_size: expected a number of bytes, got -1"),
        (with_size(True), PIXELS, "binary_data_size: expected a number of bytes, got True"),
        ({"inputs": [BINARY]}, b"", "input 'image': expected data or binary_data_size"),
        (
            {"inputs": [{**BINARY, "data": [1], "parameters": {"binary_data_size": 24}}]},
            PIXELS,
            "expected data or binary_data_size, got both",
        ),
        ({}, b"", "inputs: field required"),
        ({"inputs": [{"name": "image"}]}, b"", r"inputs\.0\.datatype: field required"),
        ({"inputs": [{**BINARY, "shape": [-1]}]}, b"", r"inputs\.0\.shape\.0: .*greater"),
        ({"inputs": [{**BINARY, "shape": "x"}]}, b"", r"inputs\.0\.shape: "),
        ([1], b"", "body: "),
    ],
)
def test_mistakes_name_the_field(header, raw, message):
    with pytest.raises(InvalidRequestError, match=message):
        read_infer_body(*body(header, raw))


def test_what_json_has_no_number_for_is_null_and_stays_in_raw_tensors():
    scores = np.array([[0.5, np.nan], [np.inf, -np.inf]], np.float32)
    output = OutputTensor("logits", "FP32", scores.shape, scores)
    request = read_infer_body(body({"inputs": []})[0], None)
    text, _ = write_infer_body({}, [output], request)
    assert json.loads(text, parse_constant=pytest.fail)["outputs"][0]["data"] == [0.5, *[None] * 3]
    wanted = {"name": "logits", "parameters": {"binary_data": True}}
    request = read_infer_body(body({"inputs": [], "outputs": [wanted]})[0], None)
    text, length = write_infer_body({}, [output], request)
    assert text[length:] == scores.tobytes()


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[[[["])
def test_what_is_no_json_is_rejected(text):
    with pytest.raises(InvalidRequestError, match="body: "):
        read_infer_body(text, None)


def test_a_header_longer_than_the_body_is_rejected():
    with pytest.raises(InvalidRequestError, match="Inference-Header-Content-Length"):
        read_infer_body(b"{}", 99)


SCORES = np.array([[0.25, 0.75]], np.float32)
OUTPUTS = [
    OutputTensor("logits", "FP32", (1, 2), SCORES),
    OutputTensor("probabilities", "BYTES", (1, 1), (b"0.75:1:one",)),
]


def request(outputs: list[dict[str, object]], **parameters: object) -> InferBody:
    return read_infer_body(
        *body({**with_size(24), "outputs": outputs, "parameters": parameters}, PIXELS)
    )


def test_outputs_are_plain_unless_asked_for_as_binary():
    text, header_bytes = write_infer_body({"model_name": "m"}, OUTPUTS, request([]))
    assert header_bytes is None
    assert json.loads(text) == {
        "model_name": "m",
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 0.75]},
            {"name": "probabilities", "datatype": "BYTES", "shape": [1, 1], "data": ["0.75:1:one"]},
        ],
    }


@pytest.mark.parametrize(
    ("outputs", "parameters", "binary"),
    [
        ([{"name": "logits", "parameters": {"binary_data": True}}], {}, {"logits"}),
        ([], {"binary_data_output": True}, {"logits", "probabilities"}),
        ([{"name": "logits"}], {"binary_data_output": True}, {"logits"}),
        (
            [{"name": "logits", "parameters": {"binary_data": False}}, {"name": "probabilities"}],
            {"binary_data_output": True},
            {"probabilities"},
        ),
    ],
)
def test_the_caller_says_which_outputs_are_binary(outputs, parameters, binary):
    text, header_bytes = write_infer_body({}, OUTPUTS, request(outputs, **parameters))
    described = json.loads(text[:header_bytes])["outputs"]
    assert {output["name"] for output in described if "data" not in output} == binary
    raw = {"logits": SCORES.tobytes(), "probabilities": b"\x0a\0\0\x000.75:1:one"}
    assert text[header_bytes:] == b"".join(
        raw[output.name] for output in OUTPUTS if output.name in binary
    )
