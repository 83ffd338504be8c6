"""grpc.health.v1: Check and Watch, for the whole server, each gRPC service and each model.

The servicer that comes with grpcio-health-checking keeps one condition for all watchers of a name
and drops it when any of them leaves, so that the others hear nothing more; and it waits for slow
watchers. Here each has an event of its own.
"""

import asyncio

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN
# The empty name asks for the server as a whole.
WHOLE_SERVER = ""


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped package
    """Answers Check and Watch; the server as a whole is NOT_SERVING at first."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {WHOLE_SERVER: NOT_SERVING}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._draining = False
        self._closed = False

    def set(self, name: str, serving: bool) -> None:
        """Says whether a name is served; after `drain` nothing is any more."""
        self._states[name] = SERVING if serving and not self._draining else NOT_SERVING
        self._tell(name)

    def remove(self, name: str) -> None:
        """Forgets a name; its watchers are told SERVICE_UNKNOWN."""
        self._states.pop(name, None)
        self._tell(name)

    def drain(self) -> None:
        """Turns every name to NOT_SERVING, for good."""
        self._draining = True
        for name in self._states:
            self.set(name, serving=False)

    def close(self) -> None:
        """Ends the watches, which otherwise would hold up the server's stop."""
        self._closed = True
        for name in self._watchers:
            self._tell(name)

    async def Check(
        self,
        request: pb.HealthCheckRequest,
        context: grpc.aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse],
    ) -> pb.HealthCheckResponse:
        """Says how a name is; NOT_FOUND for one that is not known."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return pb.HealthCheckResponse(status=state)

    async def Watch(
        self,
        request: pb.HealthCheckRequest,
        context: grpc.aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse],
    ) -> None:
        """Says how a name is, at once and at each change, until the caller or the server leaves."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(request.service, set())
        watchers.add(changed)
        told: int | None = None
        try:
            while True:
                changed.clear()
                state = self._states.get(request.service, SERVICE_UNKNOWN)
                if state != told:
                    await context.write(pb.HealthCheckResponse(status=state))
                    told = state
                elif self._closed:
                    return
                else:
                    await changed.wait()
        finally:
            watchers.discard(changed)
            if not watchers and self._watchers.get(request.service) is watchers:
                del self._watchers[request.service]

    def _tell(self, name: str) -> None:
        for changed in self._watchers.get(name, ()):
            changed.set()
