"""The client programs: where they run, what they do, and what each call should come to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.edge.interop.environments import node_with, python_with
from tests.server.conftest import mean_color_logits

PROGRAMS = Path(__file__).with_name("programs")
TIMEOUT_S = 200
LARGE_IMAGES = 65536
# Every byte of it that is not printable ASCII has to be escaped in the status.
UNKNOWN_MODEL = "größe ✓ 100%/\n\u2028🖼"
PIXELS = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
ANSWER = {"version": "1", "logits": mean_color_logits(PIXELS).astype("<f4").tobytes().hex()}
CANCELLED, DEADLINE_EXCEEDED, NOT_FOUND, RESOURCE_EXHAUSTED = 1, 4, 5, 8
SERVING = 1


@dataclass(frozen=True)
class Client:
    """A program and where it runs.

    Attributes:
        command: Returns the interpreter's command; skips where it cannot be had.
        folder: Returns the folder it runs in; None for any.
        lacks: Calls that the client does not offer, and why.
    """

    program: str
    command: Callable[[], list[str]]
    folder: Callable[[], Path] | None = None
    lacks: dict[str, str] = field(default_factory=dict)


def _own_python() -> list[str]:
    return [sys.executable]


def _old_python() -> list[str]:
    return python_with("grpcio-1.60", "grpcio==1.60.2", "protobuf==4.25.8")


def _grpclib_python() -> list[str]:
    return python_with("grpclib", "grpclib==0.4.9", "protobuf==6.33.6")


def _node() -> list[str]:
    return ["node"]


def _grpc_js() -> Path:
    return node_with("grpc-js", "@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.0")


def _connect_node() -> Path:
    packages = ("@connectrpc/connect@2.3.0", "@connectrpc/connect-node@2.3.0")
    return node_with("connect-node", *packages, "@bufbuild/protobuf@2")


CLIENTS = {
    "grpcio": Client("grpcio_sync.py", _own_python),
    "grpcio aio": Client("grpcio_aio.py", _own_python),
    "grpcio 1.60": Client("grpcio_sync.py", _old_python),
    "grpcio 1.60 aio": Client("grpcio_aio.py", _old_python),
    "tritonclient": Client(
        "triton_calls.py",
        _own_python,
        lacks={
            "watched": "tritonclient has no client of grpc.health.v1",
            "trailers": "tritonclient does not show trailers",
        },
    ),
    "grpclib": Client(
        "grpclib_calls.py",
        _grpclib_python,
        lacks={
            "gzip": "grpclib cannot compress messages",
            "trailers": 'grpclib hides trailers whose names begin with "grpc-"',
        },
    ),
    "grpc-js": Client("grpc_js.mjs", _node, _grpc_js),
    "connect-node": Client("connect_node.mjs", _node, _connect_node),
}
# What a call comes to with every client.
EXPECTED: dict[str, object] = {
    "unary": ANSWER,
    "gzip": ANSWER,
    "secure": ANSWER,
    "large": LARGE_IMAGES * 3 * 4,
    "oversized": RESOURCE_EXHAUSTED,
    "watched": SERVING,
    "deadline": DEADLINE_EXCEEDED,
    "cancel": CANCELLED,
}


@dataclass(frozen=True)
class Targets:
    """Addresses of the servers of one transport, or of a proxy before each, and client credentials.

    Attributes:
        edge: A server that answers at once.
        waiting: A server that holds requests back.
        secure: A server with mutual TLS.
        ca: PEM file with the authority of `secure`.
        certificate: PEM file with the client's certificate.
        key: PEM file with its key.
    """

    edge: str
    waiting: str
    secure: str
    ca: Path
    certificate: Path
    key: Path


def all_calls(targets: Targets, descriptors: Path) -> dict[str, object]:
    """Return the task to make every call once."""
    return {
        **_task(targets.edge, descriptors),
        "waiting": targets.waiting,
        "secure": targets.secure,
        "ca": str(targets.ca),
        "certificate": str(targets.certificate),
        "key": str(targets.key),
    }


def calls_until(version: int, address: str, descriptors: Path) -> dict[str, object]:
    """Return the task to call without a pause until a version has answered."""
    return {**_task(address, descriptors), "until_version": str(version)}


def _task(address: str, descriptors: Path) -> dict[str, object]:
    return {
        "address": address,
        "descriptors": str(descriptors),
        "pixels": PIXELS.tobytes().hex(),
        "large_images": LARGE_IMAGES,
        "unknown_model": UNKNOWN_MODEL,
    }


def start(client: Client, task: dict[str, object]) -> subprocess.Popen[str]:
    """Start a client's program on a task."""
    return subprocess.Popen(
        [*client.command(), str(PROGRAMS / client.program), json.dumps(task)],
        cwd=client.folder() if client.folder else None,
        # The programs' own packages, not those of this project.
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a program's end and return its report."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report
