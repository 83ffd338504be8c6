"""Inference by REST, with a fast path for requests that differ in their pixels alone.

The JSON of a request is parsed and checked once for each version of a model, and cached as a
`Plan`. For later requests with the same JSON the pixels become a view of the body, and the
reply is joined from prepared parts. A request without a plan (values in JSON, image files, classes)
is answered by the general path. Both paths must give the same replies;
tests/server/rest/test_infer.py compares them.
"""

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from convoy.server.edge.connections import DisconnectWatch
from convoy.server.edge.limits import BODY_S, ByteBudget, IncompleteRequest, MessageLimits
from convoy.server.errors import InvalidRequestError, OverloadedError, RequestError
from convoy.server.models.manifest import Manifest
from convoy.server.models.registry import ServedModel
from convoy.server.protocol.calls import Call, CallBoundary, DisconnectedError, Failure, Status
from convoy.server.protocol.inference import Inference, InferenceAnswer, InferenceQuery
from convoy.server.protocol.parameters import RequestOptions, read_options
from convoy.server.protocol.tensors import PIXELS, OutputTensor
from convoy.server.requests import Outputs, Prediction
from convoy.server.rest.codec import HEADER_LENGTH, InferBody, read_infer_body, write_infer_body

# The scope's key under which a route stores its name for the metrics.
METHOD_KEY = "convoy.method"
_METHOD = "RestInfer"
HTTP_STATUS_OF = {
    Status.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Status.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Status.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Status.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    Status.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    Status.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    Status.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Status.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
# Well-behaved callers send fewer and shorter heads.
_MAX_PLANS = 1024
_MAX_HEAD_BYTES = 4096
_MS_PER_S = 1000.0


class HttpCaller:
    """The request as the call boundary sees it; HTTP has no deadline."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def time_remaining(self) -> float | None:
        """Return None: there is no deadline but the server's and the request's own."""
        return None

    def peer(self) -> str:
        """Return the caller's address, as gRPC writes it."""
        caller = self._scope.get("client")
        return f"ipv4:{caller[0]}:{caller[1]}" if caller else ""


def error_reply(failure: Failure) -> JSONResponse:
    """Return the response for a failure."""
    headers = {}
    if failure.retry_after_ms:
        # In whole seconds, so one is the minimum.
        headers["Retry-After"] = str(math.ceil(failure.retry_after_ms / 1000))
    return JSONResponse({"error": failure.message}, HTTP_STATUS_OF[failure.status], headers)


class RequestBody(IncompleteRequest):
    """Reads a body; leaving the context returns its bytes to the budget.

    Args:
        receive: Of the ASGI request.
        max_bytes: Larger bodies are rejected.
        budget: Bounds the bytes of all requests.

    Example:
        with RequestBody(receive, max_bytes, budget) as body:
            content = await body.read(announced)
    """

    def __init__(self, receive: Receive, max_bytes: int, budget: ByteBudget) -> None:
        super().__init__()
        self._receive = receive
        self._max_bytes = max_bytes
        self._budget = budget
        self._task: asyncio.Task[object] | None = None
        self._interruption: RequestError | None = None

    def __enter__(self) -> "RequestBody":
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.release(self)

    async def read(self, announced: bytes) -> bytes:
        """Return all of it.

        Args:
            announced: The field content-length; empty without one.

        Raises:
            InvalidRequestError: It is too large, or took too long.
            OverloadedError: The memory for requests is full.
            DisconnectedError: The caller disconnected before its end.
        """
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_large(announced.decode())
        # Until the first chunk the request holds nothing, and h2corn bounds the time.
        chunk, more = await self._next()
        return await self._rest([chunk]) if more else chunk

    def end(self) -> None:
        """End the request while its body is not complete, because others need the memory."""
        self._interrupt(
            OverloadedError(
                "the server's memory for requests is full, and this one was not complete"
            )
        )

    async def _rest(self, chunks: list[bytes]) -> bytes:
        self._task = asyncio.current_task()
        timer = asyncio.get_running_loop().call_later(BODY_S, self._end_late)
        self._budget.incomplete.add(self)
        try:
            more = True
            while more:
                chunk, more = await self._next()
                chunks.append(chunk)
            return b"".join(chunks)
        except asyncio.CancelledError:
            if self._interruption is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._interruption from None
        finally:
            timer.cancel()
            self._budget.incomplete.discard(self)

    async def _next(self) -> tuple[bytes, bool]:
        event = await self._receive()
        if event["type"] != "http.request":
            raise DisconnectedError
        chunk: bytes = event.get("body", b"")
        if chunk:
            self._take(len(chunk))
        return chunk, event.get("more_body", False)

    def _take(self, size: int) -> None:
        if self.held_bytes + size > self._max_bytes:
            raise self._too_large("more")
        if not self._budget.take(size, self):
            raise OverloadedError("the server's memory for requests is full")

    def _too_large(self, found: str) -> InvalidRequestError:
        return InvalidRequestError(f"body: expected at most {self._max_bytes} bytes, got {found}")

    def _end_late(self) -> None:
        self._interrupt(InvalidRequestError(f"body: expected all of it within {BODY_S:.0f} s"))

    def _interrupt(self, error: RequestError) -> None:
        if self._task and self._interruption is None:
            self._interruption = error
            self._task.cancel()


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer requests with one JSON head by one version of a model.

    Attributes:
        manifest: Of the version; a republished version has another one.
        shape: `(N, H, W, 3)` of the pixels.
        size_bytes: The size of the pixels.
        options: The parsed parameters.
        head: The JSON of the reply.
        outputs: The names of the outputs, in their order.
    """

    manifest: Manifest
    shape: tuple[int, ...]
    size_bytes: int
    options: RequestOptions
    head: bytes
    outputs: tuple[str, ...]

    def body(self, outputs: Outputs) -> bytes:
        """Return the body of the reply."""
        parts = [self.head]
        for name in self.outputs:
            scores = outputs.logits if name == "logits" else outputs.probabilities
            parts.append(scores.astype("<f4", copy=False).tobytes())
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to be sent.

    Attributes:
        head_bytes: The length of its JSON; None where it is JSON alone.
    """

    body: bytes
    head_bytes: int | None
    timing: str

    def start(self) -> dict[str, object]:
        """Return the ASGI message that comes before the body."""
        headers = [
            (b"content-length", b"%d" % len(self.body)),
            (b"server-timing", self.timing.encode()),
        ]
        if self.head_bytes is None:
            headers.append((b"content-type", b"application/json"))
        else:
            headers.append((b"content-type", b"application/octet-stream"))
            headers.append((_HEADER_LENGTH, b"%d" % self.head_bytes))
        return {"type": "http.response.start", "status": 200, "headers": headers}


class RestInfer:
    """An ASGI application that answers POST …/infer.

    Args:
        inference: Runs the requests.
        boundary: Times and counts them.
        limits: Larger bodies are rejected.
        budget: Bounds the bytes of all requests.
    """

    def __init__(
        self,
        inference: Inference,
        boundary: CallBoundary,
        limits: MessageLimits,
        budget: ByteBudget,
    ) -> None:
        self._inference = inference
        self._boundary = boundary
        self._limits = limits
        self._budget = budget
        self._disconnects = DisconnectWatch()
        # By the path of a request and its JSON.
        self._plans: dict[tuple[str, bytes], Plan] = {}

    @staticmethod
    def answers(scope: Scope) -> bool:
        """Whether a request is one for inference."""
        return scope["method"] == "POST" and _PATH.fullmatch(scope["path"]) is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        scope[METHOD_KEY] = _METHOD
        reply = await self._boundary.attempt(
            _METHOD, HttpCaller(scope), lambda call: self._answer(call, scope, receive)
        )
        if isinstance(reply, Failure):
            await error_reply(reply)(scope, receive, send)
            return
        await send(reply.start())
        await send({"type": "http.response.body", "body": reply.body})

    async def _answer(self, call: Call, scope: Scope, receive: Receive) -> Reply:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        with RequestBody(receive, self._limits.images_bytes, self._budget) as sent:
            content = await sent.read(headers.get(b"content-length", b""))
            head_bytes = _head_bytes(headers)
            path = scope["path"]
            with self._disconnects.watching(scope):
                reply = None
                if head_bytes and head_bytes <= _MAX_HEAD_BYTES:
                    plan = self._plans.get((path, content[:head_bytes]))
                    if plan:
                        reply = await self._planned(plan, call, path, content, head_bytes)
                if reply is None:
                    reply = await self._general(call, path, content, head_bytes)
        counted = self._budget.reply(reply.body)
        if counted is None:
            raise OverloadedError("the server's memory for replies is full")
        return reply if counted is reply.body else Reply(counted, reply.head_bytes, reply.timing)

    async def _planned(
        self, plan: Plan, call: Call, path: str, content: bytes, head_bytes: int
    ) -> Reply | None:
        model = call.uses(self._inference.find(*_named(path)))
        if model.manifest is not plan.manifest or plan.size_bytes != len(content) - head_bytes:
            return None
        pixels = np.frombuffer(content, np.uint8, plan.size_bytes, head_bytes)
        images = pixels.reshape(plan.shape)  # [N, H, W, 3] uint8
        call.within(plan.options.timeout_s)
        prediction = await call.infer(model, images, plan.options.priority)
        return Reply(plan.body(prediction.outputs), len(plan.head), _server_timing(prediction))

    async def _general(
        self, call: Call, path: str, content: bytes, head_bytes: int | None
    ) -> Reply:
        body = read_infer_body(content, head_bytes)
        options = read_options(body.parameters)
        query = InferenceQuery(*_named(path), body.inputs, body.outputs, options)
        answer = await self._inference.answer(query, call)
        written, written_head_bytes = _written(answer.model, answer.tensors, body)
        if head_bytes and written_head_bytes and head_bytes <= _MAX_HEAD_BYTES:
            plan = _plan(body, options, answer, written[:written_head_bytes])
            if plan:
                if len(self._plans) >= _MAX_PLANS:
                    self._plans.clear()
                self._plans[path, content[:head_bytes]] = plan
        timing = _server_timing(answer.prediction, answer.decode_s)
        return Reply(written, written_head_bytes, timing)


def _named(path: str) -> tuple[str, str]:
    """Return the model and the version, which may be empty, that a path names."""
    names = _PATH.fullmatch(path)
    assert names, "only paths of inference are routed here"
    return names[1], names[2] or ""


def _plan(
    body: InferBody, options: RequestOptions, answer: InferenceAnswer, head: bytes
) -> Plan | None:
    """Return how to answer requests like one that was answered; None for the general path."""
    (tensor,) = body.inputs
    raw = all(body.wants_binary(each.name) and each.datatype == "FP32" for each in answer.tensors)
    if tensor.datatype != PIXELS or not isinstance(tensor.data, memoryview) or not raw:
        return None
    names = tuple(output.name for output in answer.tensors)
    size_bytes = math.prod(tensor.shape)
    return Plan(answer.model.manifest, tensor.shape, size_bytes, options, head, names)


def _head_bytes(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(_HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdigit():
        found = text.decode("latin-1")
        raise InvalidRequestError(f"{HEADER_LENGTH}: expected a number of bytes, got {found!r}")
    return int(text)


def _written(
    model: ServedModel, tensors: Sequence[OutputTensor], body: InferBody
) -> tuple[bytes, int | None]:
    head: dict[str, object] = {"model_name": model.name, "model_version": str(model.version)}
    if body.id:
        head["id"] = body.id
    return write_infer_body(head, tensors, body)


def _server_timing(prediction: Prediction, decode_s: float = 0.0) -> str:
    """Return the times of the stages in ms, as https://www.w3.org/TR/server-timing defines."""
    return (
        f"decode;dur={_MS_PER_S * decode_s:.3f}, queue;dur={_MS_PER_S * prediction.queue_s:.3f}, "
        f"inference;dur={_MS_PER_S * prediction.inference_s:.3f}, "
        f"batch;desc={prediction.batch_size}"
    )
