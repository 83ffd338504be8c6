"""A real gRPC server whose answers each test scripts."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import grpc
import pytest

from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

Handler = Callable[[pb.ClassifyRequest, grpc.ServicerContext, int], pb.ClassifyResponse]
ANSWER = pb.ClassifyResponse(model="m", version=1, classes=[pb.ClassScore(label="yes")])


@dataclass
class ScriptedServer(classifier_pb2_grpc.ClassifierServiceServicer):
    """Answers Classify by `handler`, which gets the number of earlier calls.

    Attributes:
        versions: Those that it lists.
        metadata: What came with each call.
    """

    handler: Handler
    address: str = ""
    metadata: list[dict[str, str]] = field(default_factory=list)
    versions: tuple[int, ...] = (1,)
    _guard: Lock = field(default_factory=Lock)

    @property
    def calls(self) -> int:
        return len(self.metadata)

    def Classify(self, request, context):
        with self._guard:
            earlier = self.calls
            self.metadata.append(dict(context.invocation_metadata()))
        return self.handler(request, context, earlier)

    def ListModels(self, request, context):
        models = [
            pb.ModelStatus(model="m", version=version, labels=["yes"], ready=True)
            for version in self.versions
        ]
        return pb.ListModelsResponse(models=models)


@contextmanager
def scripted_server(
    handler: Handler, credentials: grpc.ServerCredentials | None = None, port: int = 0
) -> Iterator[ScriptedServer]:
    """Serve until the end of the block."""
    scripted = ScriptedServer(handler)
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    classifier_pb2_grpc.add_ClassifierServiceServicer_to_server(scripted, server)
    if credentials is None:
        port = server.add_insecure_port(f"127.0.0.1:{port}")
    else:
        port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    scripted.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield scripted
    finally:
        server.stop(None).wait()


def answer(request, context, earlier):
    """A handler that answers every call."""
    return ANSWER


def reject_first(rejections: int, code=grpc.StatusCode.UNAVAILABLE, pushback_ms=None) -> Handler:
    """A handler that rejects some calls before it answers."""

    def handle(request, context, earlier):
        if earlier < rejections:
            if pushback_ms is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback_ms)),))
            context.abort(code, "not now")
        return ANSWER

    return handle


@pytest.fixture(params=["sync", "aio"])
def classify(request):
    """`classify(address, options, …)` by one of the two clients."""
    import asyncio

    from convoy.client import AsyncClient, Client

    def by_client(address, image=b"x", **options):
        with Client(address, **options) as client:
            return client.classify(image)

    def by_async_client(address, image=b"x", **options):
        async def run():
            async with AsyncClient(address, **options) as client:
                return await client.classify(image)

        return asyncio.run(run())

    return by_client if request.param == "sync" else by_async_client
