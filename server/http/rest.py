"""The Open Inference Protocol, version 2, by REST, with the binary tensor data extension."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server import SERVER_NAME, SERVER_VERSION
from server.catalogue import Models
from server.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from server.http.calls import Handler, HttpBoundary, read_body, while_connected
from server.http.tensors import HEADER_LENGTH, InferBody, read_infer_body, write_infer_body
from server.manifest import TensorSpec
from server.protocols.calls import Call
from server.protocols.inference import (
    INFERENCE_EXTENSIONS,
    Inference,
    InferenceAnswer,
    InferenceQuery,
)
from server.protocols.options import read_options
from server.served_model import ServedModel

Trace = Callable[[Route], Route]

_MS_PER_S = 1000.0


class RestFace:
    """Answers the protocol's REST calls.

    Args:
        catalogue: The models in service.
        inference: Runs their requests.
        boundary: Turns errors into statuses.
        max_body_bytes: Larger bodies are refused.
        trace: Wraps the routes; None leaves them as they are.
    """

    def __init__(
        self,
        catalogue: Models,
        inference: Inference,
        boundary: HttpBoundary,
        max_body_bytes: int,
        trace: Trace | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._inference = inference
        self._boundary = boundary
        self._max_body_bytes = max_body_bytes
        self._trace = trace

    def routes(self) -> list[Route]:
        """Returns the protocol's paths, those of inference first: they are asked for most."""
        model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        return [
            self._route("POST", f"{model}/infer", "RestInfer", self._infer),
            self._route("POST", f"{version}/infer", "RestInfer", self._infer),
            self._route("GET", f"{model}/ready", "RestModelReady", self._model_ready),
            self._route("GET", f"{version}/ready", "RestModelReady", self._model_ready),
            self._route("GET", model, "RestModelMetadata", self._model_metadata),
            self._route("GET", version, "RestModelMetadata", self._model_metadata),
            self._route("GET", "/v2/health/live", "RestServerLive", self._server_live),
            self._route("GET", "/v2/health/ready", "RestServerReady", self._server_ready),
            self._route("GET", "/v2", "RestServerMetadata", self._server_metadata),
        ]

    def _route(self, verb: str, path: str, name: str, handler: Handler) -> Route:
        route = Route(path, partial(self._boundary.answer, name, handler), methods=[verb])
        return self._trace(route) if self._trace else route

    async def _infer(self, call: Call, request: Request) -> Response:
        encoded = await read_body(request, self._max_body_bytes)
        body = read_infer_body(encoded, _header_bytes(request))
        query = InferenceQuery(
            *_model_and_version(request),
            body.inputs,
            body.outputs,
            read_options(body.parameters),
        )
        answer = await while_connected(request, self._inference.answer(query, call))
        return _reply(answer, body)

    async def _model_ready(self, call: Call, request: Request) -> Response:
        try:
            call.uses(self._find(request))
        except (ModelNotFoundError, UnavailableError):
            return _readiness(False)
        return _readiness(True)

    async def _model_metadata(self, call: Call, request: Request) -> Response:
        model = call.uses(self._find(request))
        return JSONResponse(
            {
                "name": model.name,
                "versions": [str(model.version)],
                "platform": model.runs_on.platform,
                "inputs": [_tensor_metadata(model.manifest.input)],
                "outputs": [_tensor_metadata(output) for output in model.manifest.outputs],
            }
        )

    async def _server_live(self, call: Call, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _server_ready(self, call: Call, request: Request) -> Response:
        return _readiness(self._catalogue.ready)

    async def _server_metadata(self, call: Call, request: Request) -> Response:
        return JSONResponse(
            {
                "name": SERVER_NAME,
                "version": SERVER_VERSION,
                "extensions": list(INFERENCE_EXTENSIONS),
            }
        )

    def _find(self, request: Request) -> ServedModel:
        return self._inference.find(*_model_and_version(request))


def _model_and_version(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _header_bytes(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal():
        raise InvalidRequestError(f"{HEADER_LENGTH}: expected a number of bytes, got {text!r}")
    return int(text)


def _reply(answer: InferenceAnswer, request: InferBody) -> Response:
    head: dict[str, object] = {
        "model_name": answer.model.name,
        "model_version": str(answer.model.version),
    }
    if request.id:
        head["id"] = request.id
    body, header_bytes = write_infer_body(head, answer.tensors, request)
    headers = {"Server-Timing": _server_timing(answer)}
    if header_bytes is None:
        return Response(body, headers=headers, media_type="application/json")
    headers[HEADER_LENGTH] = str(header_bytes)
    return Response(body, headers=headers, media_type="application/octet-stream")


def _server_timing(answer: InferenceAnswer) -> str:
    """Where the time went, as https://www.w3.org/TR/server-timing says it, in milliseconds."""
    stages = (
        ("decode", answer.decode_s),
        ("queue", answer.prediction.queue_s),
        ("inference", answer.prediction.inference_s),
    )
    times = ", ".join(f"{name};dur={_MS_PER_S * time_s:.3f}" for name, time_s in stages)
    return f"{times}, batch;desc={answer.prediction.batch_size}"


def _readiness(ready: bool) -> Response:
    return JSONResponse({"ready": ready}, HTTPStatus.OK if ready else HTTPStatus.BAD_REQUEST)


def _tensor_metadata(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
