"""Servers of a hand-made model for each transport, which every client here calls."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from convoy.oip.v2 import inference_pb2, model_config_pb2
from convoy.server.grpc.health import HEALTH
from tests.edge.interop.clients import Targets
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.certificates import Authority


@dataclass
class Servers:
    """The servers of one transport, each of which starts on its first use and stays.

    Attributes:
        flags: Of all of them.
        colors: Their repository.
        folder: For certificates.
        stack: Ends them.
    """

    flags: tuple[object, ...]
    colors: Path
    folder: Path
    stack: ExitStack

    @cached_property
    def edge(self) -> ServerProcess:
        """A server that takes messages of 5 MiB, and requests of 65,536 images (4.5 MiB)."""
        return self._start(
            *("--max-message-mib", 5, "--max-request-images", 65536, "--max-queue-size", 65536)
        )

    @cached_property
    def targets(self) -> Targets:
        """The addresses of `edge`, of one whose queue fills up, and of one with mutual TLS."""
        # It holds a lone request back for two seconds and lets two images wait.
        waiting = self._start("--max-queue-delay-ms", 2000, "--max-queue-size", 2)
        authority = Authority()
        certificate, key = authority.issue_into(self.folder)
        files = {"ca": authority.pem}
        files["client"], files["client.key"] = authority.issue("client")
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        tls = ("--tls-certificate", certificate, "--tls-key", key)
        secure = self._start(*tls, "--tls-client-ca", self.folder / "ca")
        return Targets(
            self.edge.address,
            waiting.address,
            secure.address,
            self.folder / "ca",
            self.folder / "client",
            self.folder / "client.key",
        )

    def _start(self, *flags: object) -> ServerProcess:
        command = ("--device", "cpu", *self.flags, *flags)
        return self.stack.enter_context(running_server(self.colors, *command))


@pytest.fixture(scope="module")
def servers_of(
    colors: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Servers]]:
    """The servers of a transport, kept for all tests that ask for them."""
    with ExitStack() as stack:

        @cache
        def servers(transport: str) -> Servers:
            folder = tmp_path_factory.mktemp("certificates")
            return Servers(GRPC_FLAGS[transport], colors, folder, stack)

        yield servers


@pytest.fixture(params=GRPC_FLAGS)
def transport(request: pytest.FixtureRequest) -> str:
    """A way that the server carries gRPC."""
    return str(request.param)


@pytest.fixture
def servers(transport: str, servers_of: Callable[[str], Servers]) -> Servers:
    """The servers of the transport under test."""
    return servers_of(transport)


@pytest.fixture
def edge(servers: Servers) -> ServerProcess:
    """The server under test that answers at once."""
    return servers.edge


@pytest.fixture(scope="session")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the descriptor set of the services that the programs call."""
    files = [each.DESCRIPTOR.serialized_pb for each in (model_config_pb2, inference_pb2)]
    content = FileDescriptorSet()
    for file in (*files, HEALTH.file.serialized_pb):
        content.file.add().MergeFromString(file)
    path = tmp_path_factory.mktemp("descriptors") / "services.binpb"
    path.write_bytes(content.SerializeToString())
    return path
