"""A page to look at: drop an image, see its classes; see how the server has fared lately."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server import SERVER_NAME, SERVER_VERSION
from server.catalogue import Models
from server.http.history import History
from server.served_model import ServedModel

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# The page loads nothing from elsewhere, and nobody may frame it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def ui_routes(catalogue: Models, history: History) -> list[Route]:
    """Returns the page's files and the state that it shows."""

    async def state(request: Request) -> Response:
        return JSONResponse(
            {
                "name": SERVER_NAME,
                "version": SERVER_VERSION,
                "ready": catalogue.ready,
                "models": [_describe(model, catalogue.ready) for model in catalogue],
                "history": history.recent(),
            }
        )

    return [*(_file_route(path) for path in _FILES), Route("/ui/state", state)]


def _file_route(path: str) -> Route:
    name, media_type = _FILES[path]
    content = (files(__package__) / "page" / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return Route(path, answer)


def _describe(model: ServedModel, ready: bool) -> dict[str, object]:
    height_px, width_px, _ = model.manifest.sample_shape
    return {
        "name": model.name,
        "version": model.version,
        "ready": ready,
        "height_px": height_px,
        "width_px": width_px,
        "classes": len(model.manifest.labels),
        "platform": model.runs_on.platform,
        "device": model.runs_on.device,
        "provider": model.runs_on.provider,
        "max_batch_size": model.batcher.limits.max_batch_size,
    }
