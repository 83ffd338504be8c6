"""What the protocol says of each RPC, and which status a wrong request gets."""

from collections.abc import Callable

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from tests.conformance.conftest import Target, outputs_of

_CONTENTS = {"UINT8": "uint_contents", "FP32": "fp32_contents"}


def status_of(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name


def test_it_is_live_and_ready(stub):
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=10).live
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=10).ready


def test_it_says_what_it_is(stub):
    reply = stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=10)
    assert reply.name
    assert reply.version


def test_the_model_is_ready(stub, target):
    assert stub.ModelReady(pb.ModelReadyRequest(name=target.model), timeout=10).ready


def test_an_unknown_model_is_not_ready_which_is_no_error(stub):
    assert not stub.ModelReady(pb.ModelReadyRequest(name="no-such-model"), timeout=10).ready


def test_metadata_describe_every_tensor(stub, target):
    reply = stub.ModelMetadata(pb.ModelMetadataRequest(name=target.model), timeout=10)
    assert reply.name == target.model
    assert reply.platform
    assert reply.inputs
    assert reply.outputs
    for tensor in (*reply.inputs, *reply.outputs):
        assert tensor.name
        assert tensor.datatype
        assert tensor.shape


def test_metadata_name_the_versions(stub, target):
    reply = stub.ModelMetadata(pb.ModelMetadataRequest(name=target.model), timeout=10)
    assert reply.versions


def test_metadata_of_an_unknown_model_are_not_found(stub):
    request = pb.ModelMetadataRequest(name="no-such-model")
    assert status_of(lambda: stub.ModelMetadata(request, timeout=10)) == "NOT_FOUND"


def test_the_id_is_echoed(stub, target):
    reply = stub.ModelInfer(target.request(target.rows(1, seed=1), id="seven"), timeout=30)
    assert reply.id == "seven"


def test_the_reply_names_the_model_and_the_version_that_ran(stub, target):
    reply = stub.ModelInfer(target.request(target.rows(1, seed=1)), timeout=30)
    assert reply.model_name == target.model
    assert reply.model_version


def test_the_version_that_ran_can_be_asked_for(stub, target):
    first = stub.ModelInfer(target.request(target.rows(1, seed=1)), timeout=30)
    request = target.request(target.rows(1, seed=1), model_version=first.model_version)
    assert stub.ModelInfer(request, timeout=30).model_version == first.model_version


def test_every_output_has_a_row_for_each_row_of_the_input(stub, target):
    outputs = outputs_of(stub.ModelInfer(target.request(target.rows(3, seed=2)), timeout=30))
    assert outputs
    assert all(len(array) == 3 for array in outputs.values())


def test_rows_get_the_same_answer_alone_and_together(stub, target):
    rows = target.rows(3, seed=3)
    together = outputs_of(stub.ModelInfer(target.request(rows), timeout=30))
    for index in range(3):
        alone = outputs_of(stub.ModelInfer(target.request(rows[index : index + 1]), timeout=30))
        for name, array in alone.items():
            np.testing.assert_allclose(array[0], together[name][index], rtol=1e-3, atol=1e-3)


def test_only_requested_outputs_come_back(stub, target):
    rows = target.rows(1, seed=1)
    # Not every server's metadata tell of outputs.
    name = stub.ModelInfer(target.request(rows), timeout=30).outputs[-1].name
    reply = stub.ModelInfer(target.request(rows, outputs=[{"name": name}]), timeout=30)
    assert [output.name for output in reply.outputs] == [name]


def test_typed_contents_give_the_same_answer_as_raw(stub, target):
    rows = target.rows(1, seed=4)
    raw = outputs_of(stub.ModelInfer(target.request(rows), timeout=30))
    typed = target.request(rows)
    typed.ClearField("raw_input_contents")
    contents = getattr(typed.inputs[0].contents, _CONTENTS[target.input.datatype])
    contents.extend(rows.ravel().tolist())
    for name, array in outputs_of(stub.ModelInfer(typed, timeout=30)).items():
        np.testing.assert_allclose(array, raw[name], atol=1e-6)


def _edit(request: pb.ModelInferRequest, fault: str) -> None:
    tensor = request.inputs[0]
    match fault:
        case "no input":
            request.ClearField("inputs")
            request.ClearField("raw_input_contents")
        case "input's name":
            tensor.name = "no-such-input"
        case "datatype":
            tensor.datatype = "FP64"
        case "unknown datatype":
            tensor.datatype = "NUMBER"
        case "rank":
            tensor.shape.append(1)
        case "sample's shape":
            tensor.shape[-1] += 1
        case "raw size":
            request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
        case "raw count":
            request.raw_input_contents.append(b"")
        case "raw and typed":
            getattr(tensor.contents, _CONTENTS[tensor.datatype]).append(1)
        case "no contents":
            request.ClearField("raw_input_contents")
        case "output's name":
            request.outputs.add(name="no-such-output")
        case "negative shape":
            tensor.shape[0] = -1


@pytest.mark.parametrize(
    "fault",
    [
        "no input",
        "input's name",
        "datatype",
        "unknown datatype",
        "rank",
        "sample's shape",
        "raw size",
        "raw count",
        "raw and typed",
        "no contents",
        "output's name",
        "negative shape",
    ],
)
def test_a_wrong_request_is_an_invalid_argument(stub, target: Target, fault):
    request = target.request(target.rows(1, seed=1))
    _edit(request, fault)
    assert status_of(lambda: stub.ModelInfer(request, timeout=30)) == "INVALID_ARGUMENT"


def test_an_unknown_model_is_not_found(stub, target):
    request = target.request(target.rows(1, seed=1), model_name="no-such-model")
    assert status_of(lambda: stub.ModelInfer(request, timeout=30)) == "NOT_FOUND"


def test_an_unknown_version_is_not_found(stub, target):
    request = target.request(target.rows(1, seed=1), model_version="987654")
    assert status_of(lambda: stub.ModelInfer(request, timeout=30)) == "NOT_FOUND"


def test_a_request_is_answered_within_its_deadline_or_fails_with_its_status(stub, target):
    request = target.request(target.rows(1, seed=1))
    codes = set()
    for number in range(30):
        # gRPC's clients round up to milliseconds, so the shortest of these can still be kept.
        call = stub.ModelInfer.future(request, timeout=1e-6 * 2**number)
        codes.add(call.code().name)
    assert codes <= {"OK", "DEADLINE_EXCEEDED"}
    assert "OK" in codes
