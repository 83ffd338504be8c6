"""The Open Inference Protocol, version 2, by REST, with the binary tensor data extension."""

from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convoy.server import SERVER_NAME, __version__
from convoy.server.errors import (
    ModelNotFoundError,
    UnavailableError,
)
from convoy.server.models.registry import Models, ServedModel
from convoy.server.protocol.calls import Call, CallBoundary, Failure
from convoy.server.protocol.inference import (
    INFERENCE_EXTENSIONS,
    Inference,
)
from convoy.server.protocol.tensors import describe_tensor
from convoy.server.rest.infer import METHOD_KEY, HttpCaller, RestInfer, error_reply

Handler = Callable[[Call, Request], Awaitable[Response]]


class HttpBoundary:
    """Turns domain errors into HTTP statuses.

    Args:
        boundary: Times and counts every request, as it does for gRPC.

    Example:
        Route("/v2", partial(boundary.answer, "RestServerMetadata", describe_server))
    """

    def __init__(self, boundary: CallBoundary) -> None:
        self._boundary = boundary

    async def answer(self, method: str, handler: Handler, request: Request) -> Response:
        """Run a handler and return its response, or the one for the error that it raises."""
        request.scope[METHOD_KEY] = method
        answer = await self._boundary.attempt(
            method, HttpCaller(request.scope), lambda call: handler(call, request)
        )
        return error_reply(answer) if isinstance(answer, Failure) else answer


Trace = Callable[[Route], Route]


class RestRoutes:
    """Answer the protocol's REST calls.

    Args:
        models: The models in service.
        inference: Finds them.
        infer: Runs their requests.
        boundary: Turns errors into statuses.
        trace: Wraps the routes; None traces nothing.
    """

    def __init__(
        self,
        models: Models,
        inference: Inference,
        infer: RestInfer,
        boundary: HttpBoundary,
        *,
        trace: Trace | None = None,
    ) -> None:
        self._models = models
        self._inference = inference
        self._infer = infer
        self._boundary = boundary
        self._trace = trace

    @property
    def direct(self) -> RestInfer | None:
        """The application for inference requests that needs no route; None if routes are traced."""
        return None if self._trace else self._infer

    def routes(self) -> list[Route]:
        """Return the protocol's paths."""
        model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        return [
            self._traced(Route(f"{model}/infer", self._infer, methods=["POST"])),
            self._traced(Route(f"{version}/infer", self._infer, methods=["POST"])),
            self._route("GET", f"{model}/ready", "RestModelReady", self._model_ready),
            self._route("GET", f"{version}/ready", "RestModelReady", self._model_ready),
            self._route("GET", model, "RestModelMetadata", self._model_metadata),
            self._route("GET", version, "RestModelMetadata", self._model_metadata),
            self._route("GET", "/v2/health/live", "RestServerLive", self._server_live),
            self._route("GET", "/v2/health/ready", "RestServerReady", self._server_ready),
            self._route("GET", "/v2", "RestServerMetadata", self._server_metadata),
        ]

    def _route(self, verb: str, path: str, name: str, handler: Handler) -> Route:
        return self._traced(
            Route(path, partial(self._boundary.answer, name, handler), methods=[verb])
        )

    def _traced(self, route: Route) -> Route:
        return self._trace(route) if self._trace else route

    async def _model_ready(self, call: Call, request: Request) -> Response:
        try:
            model = call.uses(self._find(request))
        except (ModelNotFoundError, UnavailableError):
            return _state("ready", False)
        return _state("ready", self._models.readiness.versions[model.name, model.version])

    async def _model_metadata(self, call: Call, request: Request) -> Response:
        model = call.uses(self._find(request))
        return JSONResponse(
            {
                "name": model.name,
                "versions": [str(model.version)],
                "platform": model.runs_on.platform,
                "inputs": [describe_tensor(model.manifest.input)],
                "outputs": [describe_tensor(output) for output in model.manifest.outputs],
            }
        )

    async def _server_live(self, call: Call, request: Request) -> Response:
        return _state("live", self._models.readiness.live)

    async def _server_ready(self, call: Call, request: Request) -> Response:
        return _state("ready", self._models.readiness.ready)

    async def _server_metadata(self, call: Call, request: Request) -> Response:
        return JSONResponse(
            {
                "name": SERVER_NAME,
                "version": __version__,
                "extensions": list(INFERENCE_EXTENSIONS),
            }
        )

    def _find(self, request: Request) -> ServedModel:
        return self._inference.find(*_model_and_version(request))


def _model_and_version(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _state(name: str, good: bool) -> Response:
    return JSONResponse({name: good}, HTTPStatus.OK if good else HTTPStatus.BAD_REQUEST)
