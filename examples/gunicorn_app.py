"""A WSGI service in several gunicorn workers, each with a client of its own.

cd examples && CONVOY_ADDRESS=127.0.0.1:8001 gunicorn --preload --workers 2 gunicorn_app:app
curl --data-binary @seven.png http://127.0.0.1:8000/
"""

import json
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from convoy.client import Client, ClientError


@cache
def client() -> Client:
    """Return the worker's client; made with its first request, so after gunicorn has forked."""
    return Client(timeout_s=5)


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    image = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    try:
        best = client().classify(image).best
        status, body = "200 OK", {"label": best.label, "worker": os.getpid()}
    except ClientError as error:
        status, body = "502 Bad Gateway", {"error": str(error)}
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]
