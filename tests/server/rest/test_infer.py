"""REST replies by the fast path and by the general one are the same, whatever the request."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convoy.server.edge.limits import ByteBudget, MessageLimits
from convoy.server.rest.infer import RestInfer
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits, publish_version
from tests.server.inprocess import Servicers, servicers

SAMPLE = HEIGHT * WIDTH * 3
MAX_BODY_BYTES = 1_000_000
PATH = "/v2/models/colors/infer"
Head = dict[str, object]


class Served:
    """The application of inference on a loop of its own."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.parts: Servicers = self.runner.run(self._enter(folder))
        self.budget = ByteBudget(1 << 30)
        self.infer = RestInfer(
            self.parts.inference._inference,
            self.parts.inference._boundary,
            MessageLimits(MAX_BODY_BYTES, 0),
            self.budget,
        )

    async def _enter(self, folder: Path) -> Servicers:
        return await self._stack.enter_async_context(servicers(folder))

    def close(self) -> None:
        self.runner.run(self._stack.aclose())
        self.runner.close()

    def ask(
        self, head: object, pixels: bytes, *, path: str = PATH, chunks: int = 1
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        """Returns status, header fields and body."""
        text = head if isinstance(head, bytes) else json.dumps(head).encode()
        return self.runner.run(_ask(self.infer, path, text, pixels, chunks))

    def ask_both_ways(self, head: object, pixels: bytes, path: str = PATH) -> object:
        """Returns the replies without a plan and, if the first made one, with it."""
        self.infer._plans.clear()
        return [self.ask(head, pixels, path=path) for _ in range(2)]


async def _ask(infer: RestInfer, path: str, text: bytes, pixels: bytes, chunks: int):
    content = text + pixels
    size = -(-len(content) // chunks)
    events = [
        {
            "type": "http.request",
            "body": content[start : start + size],
            "more_body": start + size < len(content),
        }
        for start in range(0, len(content), size)
    ]
    headers = [
        (b"content-length", b"%d" % len(content)),
        (b"inference-header-content-length", b"%d" % len(text)),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "http_version": "2",
        "path": path,
        "headers": headers,
        "client": ("127.0.0.1", 5000),
    }
    sent = []

    async def receive():
        return events.pop(0)

    async def send(message):
        sent.append(message)

    await infer(scope, receive, send)
    start, *bodies = sent
    return start["status"], dict(start["headers"]), b"".join(each["body"] for each in bodies)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    served = Served(publish_version(tmp_path_factory.mktemp("models") / "colors" / "1"))
    yield served
    served.close()


def pixels_of(count: int = 1) -> bytes:
    return bytes(i % 251 for i in range(count * SAMPLE))


def head_of(count: int = 1, **changes: object) -> Head:
    shape = [count, HEIGHT, WIDTH, 3]
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": shape,
        "parameters": {"binary_data_size": count * SAMPLE},
    }
    return {"inputs": [tensor], "parameters": {"binary_data_output": True}, **changes}


def binary(*names: str, **parameters: object) -> list[Head]:
    return [{"name": name, "parameters": {"binary_data": True, **parameters}} for name in names]


def without_times(reply: tuple[int, dict[bytes, bytes], bytes]) -> object:
    status, headers, body = reply
    times = headers.pop(b"server-timing", b"")
    return status, headers, body, re.sub(rb"[0-9.]+", b"0", times)


ORDINARY = {
    "plain": head_of(),
    "three images": head_of(3),
    "an id": head_of(id="sieben ü"),
    "one output": head_of(outputs=binary("logits")),
    "both outputs": head_of(outputs=binary("probabilities", "logits")),
    "parameters": head_of(parameters={"binary_data_output": True, "priority": 1, "mine": "x"}),
    "a timeout": head_of(parameters={"binary_data_output": True, "timeout": 60_000_000}),
}


@pytest.mark.parametrize("head", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("path", [PATH, "/v2/models/colors/versions/1/infer"])
def test_ordinary_requests_take_the_fast_path_and_get_the_same_bytes(
    served, monkeypatch, head, path
):
    count = head["inputs"][0]["shape"][0]
    general = served.ask(head, pixels_of(count), path=path)
    monkeypatch.setattr(RestInfer, "_general", None)
    fast = served.ask(head, pixels_of(count), path=path)
    assert without_times(fast) == without_times(general)
    status, headers, body = fast
    length = int(headers[b"inference-header-content-length"])
    reply = json.loads(body[:length])
    assert (status, reply["model_name"], reply.get("id")) == (200, "colors", head.get("id"))
    if reply["outputs"][0]["name"] == "logits":
        images = np.frombuffer(pixels_of(count), np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
        expected = mean_color_logits(images)
        logits = np.frombuffer(body, "<f4", expected.size, length).reshape(expected.shape)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


UNUSUAL = {
    "classes": head_of(outputs=binary("logits", classification=2)),
    "one output as JSON": head_of(
        outputs=[{"name": "logits"}, *binary("probabilities")], parameters={}
    ),
    "all outputs as JSON": head_of(parameters={}),
    "a wrong name": head_of(outputs=binary("scores")),
    "no inputs": head_of(inputs=[]),
    "a wrong timeout": head_of(parameters={"timeout": -1}),
    "no JSON": b"{",
}


@pytest.mark.parametrize("head", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_requests_have_no_plan(served, head):
    first, second = served.ask_both_ways(head, pixels_of())
    assert not served.infer._plans
    assert without_times(first) == without_times(second)


@pytest.mark.parametrize("size", [0, SAMPLE - 1, SAMPLE + 1])
def test_a_planned_head_with_other_pixels_gets_the_error_of_the_general_path(served, size):
    served.infer._plans.clear()
    general = served.ask(head_of(), bytes(size))
    assert general[0] == 400
    assert served.ask(head_of(), pixels_of())[0] == 200
    assert served.infer._plans
    assert served.ask(head_of(), bytes(size)) == general


def test_an_unknown_model_is_not_found_whichever_way_it_goes(served):
    first, second = served.ask_both_ways(head_of(), pixels_of(), "/v2/models/none/infer")
    assert first == second
    assert first[0] == 404


def test_a_version_that_was_published_again_is_planned_again(served):
    served.infer._plans.clear()
    served.ask(head_of(), pixels_of())
    ((key, plan),) = served.infer._plans.items()
    earlier = dataclasses.replace(plan.manifest)
    served.infer._plans[key] = dataclasses.replace(plan, manifest=earlier, head=b"stale")
    assert b"stale" not in served.ask(head_of(), pixels_of())[2]
    assert served.infer._plans[key] == plan


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    mutations=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    head=st.sampled_from([*ORDINARY.values(), *(h for h in UNUSUAL.values() if h != b"{")]),
)
def test_mutated_heads_get_one_answer(served, mutations, head):
    text = bytearray(json.dumps(head).encode())
    for position, value in mutations:
        text[position % len(text)] = value
    count = head["inputs"][0]["shape"][0] if head["inputs"] else 1
    first, second = served.ask_both_ways(bytes(text), pixels_of(count))
    assert without_times(first) == without_times(second)


@pytest.mark.parametrize("chunks", [2, 7])
def test_a_body_in_chunks_is_put_together(served, chunks):
    whole = served.ask(head_of(2), pixels_of(2))
    assert without_times(served.ask(head_of(2), pixels_of(2), chunks=chunks)) == without_times(
        whole
    )
    assert served.budget.used_bytes == 0
