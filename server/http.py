"""The HTTP port: /metrics for Prometheus, /healthz and /readyz for supervisors."""

import threading
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from server.errors import StartupError


class HttpServer:
    """Answers /metrics, /healthz and /readyz from a thread of its own.

    Args:
        host: Address to listen on.
        port: 0 picks a free one; `port` then tells which.
        registry: What /metrics shows.
        is_ready: Decides what /readyz answers.

    Raises:
        StartupError: The port is in use.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]
    ) -> None:
        application = _application(make_wsgi_app(registry), is_ready)
        try:
            self._server: WSGIServer = make_server(
                host, port, application, ThreadingWSGIServer, _QuietHandler
            )
        except OSError as error:
            raise StartupError(
                f"--http-port: cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stops answering and frees the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Writes nothing: a scrape every few seconds is no news."""


def _application(metrics: WSGIApplication, is_ready: Callable[[], bool]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/healthz":
            status, text = "200 OK", "live\n"
        elif path == "/readyz":
            ready = is_ready()
            status = "200 OK" if ready else "503 Service Unavailable"
            text = "ready\n" if ready else "not ready\n"
        else:
            status, text = "404 Not Found", "try /metrics, /healthz or /readyz\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return answer
