"""One server process of each transport for all tests of the edge."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.edge.frames import Http2Client
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.conftest import publish_version

TRANSPORTS = [name for name in GRPC_FLAGS if name != "front ends"]

ServerOf = Callable[[str], ServerProcess]


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the hand-made model `colors`."""
    repository = tmp_path_factory.mktemp("edge")
    publish_version(repository / "colors" / "1")
    return repository


@pytest.fixture(scope="session")
def server_of(colors: Path) -> Iterator[ServerOf]:
    """Return the server process of a transport, which starts on the first use."""
    servers: dict[str, ServerProcess] = {}
    with contextlib.ExitStack() as stack:

        def start(transport: str) -> ServerProcess:
            if transport not in servers:
                flags = ("--device", "cpu", *GRPC_FLAGS[transport])
                servers[transport] = stack.enter_context(running_server(colors, *flags))
            return servers[transport]

        yield start


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """The transport under test."""
    return str(request.param)


@pytest.fixture
def server_process(server_of: ServerOf, transport: str) -> ServerProcess:
    """The server process under test."""
    return server_of(transport)


@pytest.fixture
def client(server_process: ServerProcess) -> Iterator[Http2Client]:
    """A connection to the server under test, greetings exchanged."""
    with Http2Client.connect(server_process.address) as client:
        yield client
