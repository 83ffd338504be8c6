import struct

import numpy as np
import pytest

from convoy.server.errors import InvalidRequestError, UnsupportedError
from convoy.server.models.manifest import Manifest
from convoy.server.models.repository import read_manifest
from convoy.server.protocol.parameters import RequestOptions, read_options
from convoy.server.protocol.tensors import (
    OutputTensor,
    RequestedOutput,
    WantedOutput,
    output_tensors,
    wanted_outputs,
)
from convoy.server.requests import Outputs

LABELS = ("red", "green", "blue")
LOGITS = np.array([[0.25, 1.5, -2.0], [3.0, 3.0, 0.0]], "<f4")
OUTPUTS = Outputs(LOGITS, LOGITS / 4)


@pytest.fixture
def manifest(publish) -> Manifest:
    return read_manifest(publish())


def classes(**parameters: object) -> list[RequestedOutput]:
    return [RequestedOutput("logits", parameters)]


def test_a_request_that_names_no_output_gets_all(manifest):
    assert [w.name for w in wanted_outputs([], manifest)] == ["logits", "probabilities"]


def test_only_named_outputs_are_sent_in_the_order_of_the_request(manifest):
    named = [RequestedOutput("probabilities", {}), RequestedOutput("logits", {})]
    wanted = wanted_outputs(named, manifest)
    tensors = output_tensors(wanted, OUTPUTS, LABELS)
    assert [(t.name, t.datatype, t.shape) for t in tensors] == [
        ("probabilities", "FP32", (2, 3)),
        ("logits", "FP32", (2, 3)),
    ]
    assert tensors[1].raw() == LOGITS.tobytes()


def test_classification_gives_value_index_and_label_as_triton_writes_them(manifest):
    (wanted,) = wanted_outputs(classes(classification=2), manifest)
    (tensor,) = output_tensors([wanted], OUTPUTS, LABELS)
    assert (tensor.datatype, tensor.shape) == ("BYTES", (2, 2))
    # The lower index first in a tie.
    expected = (b"1.500000:1:green", b"0.250000:0:red", b"3.000000:0:red", b"3.000000:1:green")
    assert tensor.data == expected
    assert tensor.raw() == b"".join(struct.pack("<I", len(e)) + e for e in expected)


def test_more_classes_than_there_are_means_all():
    (tensor,) = output_tensors([WantedOutput("logits", 99)], OUTPUTS, LABELS)
    assert tensor.shape == (2, 3)


def test_raw_scores_are_little_endian():
    scores = np.array([[1.0]], ">f4")
    assert OutputTensor("logits", "FP32", (1, 1), scores).raw() == struct.pack("<f", 1)


@pytest.mark.parametrize(
    ("requested", "error", "message"),
    [
        ([RequestedOutput("loss", {})], InvalidRequestError, "logits or probabilities, got 'loss'"),
        ([RequestedOutput("logits", {})] * 2, InvalidRequestError, "'logits' is named twice"),
        (classes(classification=0), InvalidRequestError, "at least 1 class, got 0"),
        (classes(classification=-1), InvalidRequestError, "at least 1 class, got -1"),
        (classes(classification="2"), InvalidRequestError, "whole number, got '2'"),
        (classes(classification=True), InvalidRequestError, "whole number, got True"),
        (classes(classification=1.0), InvalidRequestError, "whole number, got 1.0"),
        (classes(shared_memory_region="r"), UnsupportedError, "shared memory"),
    ],
)
def test_an_invalid_output_gets_the_reason(manifest, requested, error, message):
    with pytest.raises(error, match=message):
        wanted_outputs(requested, manifest)


def test_options():
    assert read_options({}) == RequestOptions(0, float("inf"))
    assert read_options({"priority": 2, "timeout": 1500, "mine": "x"}) == RequestOptions(2, 0.0015)
    # As Triton has it, 0 is no timeout.
    assert read_options({"timeout": 0}).timeout_s == float("inf")
    assert read_options({"sequence_id": 0, "sequence_start": True}) == RequestOptions()
    assert read_options({"triton_known": True}, known={"triton_known"}) == RequestOptions()


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"priority": -1}, InvalidRequestError, "priority: expected at least 0, got -1"),
        ({"priority": "high"}, InvalidRequestError, "priority: expected a whole number"),
        ({"timeout": 0.5}, InvalidRequestError, "timeout: expected a whole number"),
        ({"timeout": True}, InvalidRequestError, "timeout: expected a whole number"),
        ({"timeout": -5}, InvalidRequestError, "timeout: expected at least 0, got -5"),
        ({"triton_unknown": 1}, InvalidRequestError, "'triton_unknown' is reserved"),
        ({"sequence_id": 7}, UnsupportedError, "sequence_id"),
        ({"sequence_id": "a"}, UnsupportedError, "sequence_id"),
    ],
)
def test_an_invalid_parameter_gets_the_reason(parameters, error, message):
    with pytest.raises(error, match=message):
        read_options(parameters)
