"""The page: classify images in the browser, see the traffic of the last minutes, read the API."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from importlib.resources.abc import Traversable

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convoy.server import SERVER_NAME, __version__
from convoy.server.errors import RequestError
from convoy.server.images.image_file import FORMATS
from convoy.server.models.registry import Models, ServedModel
from convoy.server.rest.infer import METHOD_KEY
from convoy.server.rest.traffic import ALL, Traffic

_METHOD = "Page"
_MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "json": "application/json",
    "txt": "text/plain",
}
# By the path that people type, other than the name of the file.
_NAMED = {"/": "/index.html", "/docs": "/docs.html"}
# The page loads nothing from other origins, and no page may frame it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _page_files() -> dict[str, Traversable]:
    found = dict(_below(files(__package__) / "page", "/"))
    return {**found, **{path: found[name] for path, name in _NAMED.items()}}


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _below(each, f"{path}{each.name}/")
        elif each.name.rpartition(".")[2] in _MEDIA_TYPES:
            yield path + each.name, each


_FILES = _page_files()
# These need no token: the page asks for one.
PAGE_PATHS = frozenset(_FILES)


@dataclass(frozen=True, slots=True)
class Page:
    """What the page shows.

    Attributes:
        models: The models in service.
        traffic: Of the last minutes.
        metrics_port: Where operators find /metrics; 0 where that is not known.
        grpc_port: The port for gRPC; 0 where it is that of the page.
    """

    models: Models
    traffic: Traffic
    metrics_port: int = 0
    grpc_port: int = 0

    def routes(self) -> list[Route]:
        """Return the routes of the page's files and of what it shows."""
        example = "/ui/models/{model}/versions/{version}/examples/{number:int}"
        return [
            *(_file_route(path, file) for path, file in _FILES.items()),
            Route("/ui/state", self._state),
            Route(example, self._example),
        ]

    async def _state(self, request: Request) -> Response:
        """Describe the server; with `?model=NAME` the traffic is that of one model."""
        request.scope[METHOD_KEY] = _METHOD
        return JSONResponse(
            {
                "name": SERVER_NAME,
                "version": __version__,
                "ready": self.models.readiness.ready,
                "metrics_port": self.metrics_port,
                "grpc_port": self.grpc_port,
                "models": [self._describe(model) for model in self.models],
                "traffic": self.traffic.of(request.query_params.get("model", ALL)),
            },
            headers={"Cache-Control": "no-store"},
        )

    async def _example(self, request: Request) -> Response:
        request.scope[METHOD_KEY] = _METHOD
        found = self._find(request.path_params["model"], request.path_params["version"])
        number = request.path_params["number"]
        if found is None or number >= len(found.examples):
            return JSONResponse({"error": "no such example"}, HTTPStatus.NOT_FOUND)
        content = found.examples[number]
        return Response(content, headers=_HEADERS, media_type=_image_type(content))

    def _find(self, name: str, version: str) -> ServedModel | None:
        return next((m for m in self.models if (m.name, str(m.version)) == (name, version)), None)

    def _describe(self, model: ServedModel) -> dict[str, object]:
        height_px, width_px, _ = model.manifest.sample_shape
        return {
            "name": model.name,
            "version": model.version,
            "default": self._is_default(model),
            "ready": self.models.readiness.versions[model.name, model.version],
            "height_px": height_px,
            "width_px": width_px,
            "classes": len(model.manifest.labels),
            "platform": model.runs_on.platform,
            "device": model.runs_on.device,
            "provider": model.runs_on.provider,
            "max_batch_size": model.batcher.limits.max_batch_size,
            "examples": len(model.examples),
        }

    def _is_default(self, model: ServedModel) -> bool:
        try:
            return self.models.find(model.name) is model
        except RequestError:  # the server starts or drains
            return False


def _file_route(path: str, file: Traversable) -> Route:
    content = file.read_bytes()
    media_type = _MEDIA_TYPES[file.name.rpartition(".")[2]]

    async def answer(request: Request) -> Response:
        request.scope[METHOD_KEY] = _METHOD
        return Response(content, headers=_HEADERS, media_type=media_type)

    return Route(path, answer)


def _image_type(content: bytes) -> str:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.get_format_mimetype() or "application/octet-stream"
