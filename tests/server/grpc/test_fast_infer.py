"""Replies by the fast path and by the general one are the same, whatever the request."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convoy.oip.v2 import inference_pb2 as pb
from convoy.server.grpc import fast_infer
from convoy.server.grpc.oip import InferenceServicer
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits
from tests.server.inprocess import AbortedError, Context, servicers

SAMPLE = HEIGHT * WIDTH * 3


class Served:
    """A servicer on a loop of its own, for tests that are not coroutines."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self._entered = servicers(folder)
        self.servicer = self.runner.run(self._enter()).inference

    async def _enter(self):
        return await self._entered.__aenter__()

    def close(self) -> None:
        self.runner.run(self._leave())
        self.runner.close()

    async def _leave(self) -> None:
        await self._entered.__aexit__(None, None, None)

    def ask(self, message: bytes, monkeypatch: pytest.MonkeyPatch, fast: bool) -> object:
        """The reply's bytes, or the status and its message."""
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr("convoy.server.grpc.oip.split", lambda message: None)
            return self.runner.run(_answer(self.servicer, message))


async def _answer(servicer: InferenceServicer, message: bytes) -> object:
    try:
        return await servicer.ModelInfer(message, Context())
    except AbortedError as error:
        return error.code, error.details


@pytest.fixture
def served(publish) -> Iterator[Served]:
    served = Served(publish())
    yield served
    served.close()


def request(count: int = 1, **changes: object) -> pb.ModelInferRequest:
    shape = (count, HEIGHT, WIDTH, 3)
    message = pb.ModelInferRequest(
        model_name="colors",
        id="seven",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": shape}],
        raw_input_contents=[bytes(i % 256 for i in range(count * SAMPLE))],
    )
    message.MergeFrom(pb.ModelInferRequest(**changes))
    return message


def parameter(**value: object) -> pb.InferParameter:
    return pb.InferParameter(**value)


ORDINARY = {
    "plain": request(),
    "three images": request(3),
    "no id": pb.ModelInferRequest.FromString(
        request().SerializeToString().replace(b"\x1a\x05seven", b"")
    ),
    "a long id": request(id="x" * 300),
    "a version": request(model_version="1"),
    "one output": request(outputs=[{"name": "logits"}]),
    "both outputs": request(outputs=[{"name": "probabilities"}, {"name": "logits"}]),
    "parameters": request(
        parameters={"priority": parameter(uint64_param=1), "mine": parameter(string_param="x")}
    ),
}


@pytest.mark.parametrize("message", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_requests_take_the_fast_path_and_get_the_same_bytes(served, monkeypatch, message):
    encoded = message.SerializeToString()
    fields = fast_infer.split(encoded)
    assert fields
    head = fast_infer.HeadCache().read(fields)
    assert head
    monkeypatch.setattr(InferenceServicer, "_answer", None, raising=True)
    by_fast = served.runner.run(_answer(served.servicer, encoded))
    monkeypatch.undo()
    assert by_fast == served.ask(encoded, monkeypatch, fast=False)
    reply = pb.ModelInferResponse.FromString(by_fast)
    assert (reply.model_name, reply.model_version, reply.id) == ("colors", "1", message.id)
    logits = dict(zip([o.name for o in reply.outputs], reply.raw_output_contents, strict=True)).get(
        "logits"
    )
    if logits:
        pixels = np.frombuffer(message.raw_input_contents[0], np.uint8)
        expected = mean_color_logits(pixels.reshape(-1, HEIGHT, WIDTH, 3))
        np.testing.assert_allclose(
            np.frombuffer(logits, "<f4").reshape(expected.shape), expected, atol=1e-5
        )


UNUSUAL = {
    "an id beyond ASCII": request(id="sieben ü"),
    "classes": request(
        outputs=[{"name": "logits", "parameters": {"classification": parameter(int64_param=2)}}]
    ),
    "an unknown model": request(model_name="cats"),
    "an unknown version": request(model_version="2"),
    "no version": request(model_version="new"),
    "an unknown output": request(outputs=[{"name": "loss"}]),
    "a reserved parameter": request(parameters={"triton_x": parameter(bool_param=True)}),
    "too few bytes": request(2, raw_input_contents=[b"x"]),
    "two raw contents": request(raw_input_contents=[b"x"]),
    "another input": request(inputs=[{"name": "mask"}]),
    "too many images": request(999),
    "typed beside raw": request(
        inputs=[{"name": "image", "contents": {"uint_contents": [1]}}],
    ),
    "nothing": pb.ModelInferRequest(),
}


@pytest.mark.parametrize("message", UNUSUAL.values(), ids=UNUSUAL)
def test_other_requests_are_answered_as_without_the_fast_path(served, monkeypatch, message):
    encoded = message.SerializeToString()
    # Twice: what the first left in the cache must not change the second.
    for _ in range(2):
        by_fast = served.ask(encoded, monkeypatch, fast=True)
        assert by_fast == served.ask(encoded, monkeypatch, fast=False)


def test_bytes_that_are_no_message_are_an_invalid_argument(served, monkeypatch):
    code, details = served.ask(b"\xff\xff\xff", monkeypatch, fast=True)
    assert (code.name, details) == ("INVALID_ARGUMENT", "message: expected a ModelInferRequest")


STARTS = [each for each in (*ORDINARY.values(), *UNUSUAL.values()) if each.ByteSize()]


def mutated(data: st.DataObject, encoded: bytes) -> bytes:
    """Cuts, doubles, overwrites and moves slices of a message."""
    message = bytearray(encoded)
    # The head is where the two ways could differ.
    place = st.integers(0, max(0, min(len(encoded) - 1, 80)))
    for _ in range(data.draw(st.integers(0, 3))):
        match data.draw(st.sampled_from(["byte", "cut", "double", "insert", "truncate"])):
            case "byte":
                message[data.draw(place) % len(message)] = data.draw(st.integers(0, 255))
            case "cut":
                start = data.draw(place)
                del message[start : start + data.draw(st.integers(1, 12))]
            case "double":
                start = data.draw(place)
                message[start:start] = message[start : start + data.draw(st.integers(1, 40))]
            case "insert":
                start = data.draw(place)
                message[start:start] = data.draw(st.binary(max_size=6))
            case "truncate":
                del message[-data.draw(st.integers(1, 20)) :]
        if not message:
            break
    return bytes(message)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_mutated_requests_are_answered_as_without_the_fast_way(served, monkeypatch, data):
    start = data.draw(st.sampled_from(STARTS))
    encoded = mutated(data, start.SerializeToString())
    by_fast = served.ask(encoded, monkeypatch, fast=True)
    by_general = served.ask(encoded, monkeypatch, fast=False)
    if isinstance(by_fast, bytes) and isinstance(by_general, bytes):
        # The same message, whatever the order of its fields.
        by_fast = pb.ModelInferResponse.FromString(by_fast)
        by_general = pb.ModelInferResponse.FromString(by_general)
    assert by_fast == by_general
    assert not (isinstance(by_fast, tuple) and by_fast[0].name == "INTERNAL")


def test_a_version_published_anew_is_read_anew(served, monkeypatch):
    encoded = request().SerializeToString()
    head = fast_infer.HeadCache().read(fast_infer.split(encoded))
    (model,) = served.servicer._models
    plan = head.plan(model)
    assert head.plan(model) is plan


def test_a_client_cannot_fill_the_memory_with_heads():
    heads = fast_infer.HeadCache()
    assert fast_infer.split(request(model_name="x" * 2000).SerializeToString()) is None
    for number in range(3000):
        heads.read(fast_infer.split(request(model_name=f"m{number}").SerializeToString()))
    assert len(heads) <= 1024
