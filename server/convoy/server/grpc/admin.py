"""The repository extension of the Open Inference Protocol, for the admin port only.

Models come from the repository only; a request can contain neither files nor configurations.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog

from convoy.oip.v2 import inference_pb2 as pb
from convoy.server.errors import InvalidRequestError, UnsupportedError
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.models.manager import ModelManager
from convoy.server.models.versions import VersionState
from convoy.server.security.tokens import Tokens

logger = structlog.get_logger()

_UNLOAD_PARAMETERS = frozenset({"unload_dependents"})


class RepositoryServicer:
    """Answers RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload.

    Args:
        manager: The manager of the models.
        boundary: Maps errors to status codes.
        tokens: Names the caller, for the log.
    """

    def __init__(self, manager: ModelManager, boundary: GrpcBoundary, tokens: Tokens) -> None:
        self._manager = manager
        self._boundary = boundary
        self._tokens = tokens

    async def RepositoryIndex(
        self,
        request: pb.RepositoryIndexRequest,
        context: grpc.aio.ServicerContext[pb.RepositoryIndexRequest, pb.RepositoryIndexResponse],
    ) -> pb.RepositoryIndexResponse:
        """List the versions in the repository, with their states and why one is not served."""
        async with self._boundary.answering("RepositoryIndex", context):
            _check_repository(request.repository_name)
            found = await self._manager.index()
            return pb.RepositoryIndexResponse(
                models=[
                    pb.RepositoryIndexResponse.ModelIndex(
                        name=each.model,
                        version=str(each.version),
                        state=each.state.value,
                        reason=each.reason,
                    )
                    for each in found
                    if each.state is VersionState.READY or not request.ready
                ]
            )

    async def RepositoryModelLoad(
        self,
        request: pb.RepositoryModelLoadRequest,
        context: grpc.aio.ServicerContext[
            pb.RepositoryModelLoadRequest, pb.RepositoryModelLoadResponse
        ],
    ) -> pb.RepositoryModelLoadResponse:
        """Update a model from the repository at once; rejected versions are loaded again."""
        async with self._boundary.answering("RepositoryModelLoad", context):
            _check_repository(request.repository_name)
            if request.parameters:
                raise UnsupportedError(
                    f"parameters: expected none, got {sorted(request.parameters)[0]!r}"
                )
            async with self._audited("load", request.model_name, context):
                await self._manager.load(request.model_name)
            return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: grpc.aio.ServicerContext[
            pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse
        ],
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service; it answers the requests that it accepted."""
        async with self._boundary.answering("RepositoryModelUnload", context):
            _check_repository(request.repository_name)
            if unknown := sorted(set(request.parameters) - _UNLOAD_PARAMETERS):
                raise UnsupportedError(f"parameters: unload_dependents or none, got {unknown[0]!r}")
            async with self._audited("unload", request.model_name, context):
                await self._manager.unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()

    @asynccontextmanager
    async def _audited(self, action: str, model: str, context: Any) -> AsyncIterator[None]:
        """Log an action with its caller and its result."""
        headers = dict(context.invocation_metadata())
        caller = self._tokens.name_of(headers.get("authorization", "").encode())
        audit = logger.bind(action=action, model=model, caller=caller, peer=context.peer())
        try:
            yield
        except BaseException as error:
            audit.warning("admin action failed", error=str(error) or type(error).__name__)
            raise
        audit.info("admin action")


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequestError(f"repository_name: expected none, got {name!r}")
