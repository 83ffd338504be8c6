"""Arrays to tensors of the Open Inference Protocol and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from convoy.client.errors import TensorError
from convoy.client.tensors import dtype_of, infer_request, inference
from convoy.oip.v2 import inference_pb2 as pb

NUMERIC = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


def echoed(array):
    """The array that a server returns when it echoes an input."""
    request = infer_request("m", {"x": array}, "", ())
    (tensor,) = request.inputs
    reply = pb.ModelInferResponse(model_name="m", model_version="3")
    reply.outputs.add(name="x", datatype=tensor.datatype, shape=tensor.shape)
    reply.raw_output_contents.extend(request.raw_input_contents)
    return tensor.datatype, request.raw_input_contents[0], inference(reply)


@pytest.mark.parametrize("code", NUMERIC)
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_round_trip_with_tritons_datatypes(code, order):
    array = np.arange(-3, 9).reshape(3, 4).astype(np.dtype(order + code))
    datatype, raw, answer = echoed(array)
    assert datatype == np_to_triton_dtype(np.dtype(code))
    assert raw == array.astype(array.dtype.newbyteorder("<")).tobytes()
    np.testing.assert_array_equal(answer.outputs["x"], array)
    assert (answer.model, answer.version) == ("m", "3")


def test_a_view_is_sent_row_by_row():
    array = np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-1].T
    np.testing.assert_array_equal(echoed(array)[2].outputs["x"], array)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8))
def test_bytes_round_trip_in_tritons_layout(elements):
    array = np.empty(len(elements), object)
    array[:] = elements
    datatype, raw, answer = echoed(array)
    assert datatype == "BYTES"
    assert raw == serialize_byte_tensor(array).item()
    assert list(answer.outputs["x"]) == elements


def test_text_is_sent_as_utf8():
    assert list(echoed(np.array(["zwölf", "a"]))[2].outputs["x"]) == ["zwölf".encode(), b"a"]


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("FP32", "fp32_contents", [0.5, -1.0]),
        ("FP64", "fp64_contents", [0.5, -1.0]),
        ("UINT8", "uint_contents", [0, 255]),
        ("INT16", "int_contents", [-5, 5]),
        ("INT64", "int64_contents", [-5, 2**40]),
        ("UINT64", "uint64_contents", [5, 2**63]),
        ("BOOL", "bool_contents", [True, False]),
        ("BYTES", "bytes_contents", [b"a", b""]),
    ],
)
def test_typed_replies_are_read(datatype, field, values):
    reply = pb.ModelInferResponse()
    output = reply.outputs.add(name="y", datatype=datatype, shape=[2, 1])
    getattr(output.contents, field).extend(values)
    array = inference(reply).outputs["y"]
    assert array.shape == (2, 1)
    assert array.dtype == dtype_of(datatype)
    assert list(array[:, 0]) == values


def reply(datatype="FP32", shape=(2,), raw=(b"\0" * 8,)):
    message = pb.ModelInferResponse(raw_output_contents=raw)
    message.outputs.add(name="y", datatype=datatype, shape=shape)
    return message


def typed(datatype, field, value):
    message = reply(datatype, (1,), ())
    getattr(message.outputs[0].contents, field).append(value)
    return message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (reply(shape=(3,)), r"expected \[3\], got 2"),
        (reply(raw=(b"\0" * 7,)), "7 bytes are not whole elements of FP32"),
        (reply(raw=(b"", b"")), "1 raw contents, got 2"),
        (reply("BF16"), "BF16"),
        (reply("FP16", raw=()), "raw contents only"),
        (reply("BYTES", raw=(b"\x05\0\0\0ab",)), "are not whole elements of BYTES"),
        (reply("BYTES", raw=(b"\x05\0",)), "are not whole elements of BYTES"),
        (reply(shape=(-1,)), r"expected \[-1\], got 2"),
        (reply(shape=(-1, -2)), r"expected \[-1, -2\], got 2"),
        (typed("UINT8", "uint_contents", 256), "not UINT8: .*256"),
        (typed("INT8", "int_contents", -129), "not INT8: .*-129"),
    ],
)
def test_a_malformed_reply_is_an_error(message, words):
    with pytest.raises(TensorError, match=words):
        inference(message)


def test_an_array_that_no_tensor_holds_is_an_error():
    with pytest.raises(TensorError, match="complex128"):
        infer_request("m", {"x": np.zeros(1, complex)}, "", ())
    with pytest.raises(TensorError, match="expected str or bytes"):
        infer_request("m", {"x": np.array([None])}, "", ())
