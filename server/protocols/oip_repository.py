"""The repository extension of the Open Inference Protocol, for the admin port alone.

Models are what lies in the repository: neither files nor configurations are taken from a request.
"""

import grpc

from convoy.oip.v2 import inference_pb2 as pb
from server.errors import InvalidRequestError, UnsupportedError
from server.manager import ModelManager
from server.protocols.calls import CallBoundary
from server.version_state import VersionState

_UNLOAD_PARAMETERS = frozenset({"unload_dependents"})


class RepositoryServicer:
    """Answers RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload.

    Args:
        manager: What is asked.
        boundary: Turns errors into status codes.
    """

    def __init__(self, manager: ModelManager, boundary: CallBoundary) -> None:
        self._manager = manager
        self._boundary = boundary

    async def RepositoryIndex(
        self,
        request: pb.RepositoryIndexRequest,
        context: grpc.aio.ServicerContext[pb.RepositoryIndexRequest, pb.RepositoryIndexResponse],
    ) -> pb.RepositoryIndexResponse:
        """Lists every version that lies there, with its state and why it is not served."""
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
        """Looks into the repository for a model at once; what was refused is tried again."""
        async with self._boundary.answering("RepositoryModelLoad", context):
            _check_repository(request.repository_name)
            if request.parameters:
                raise UnsupportedError(
                    f"parameters: expected none, got {sorted(request.parameters)[0]!r}"
                )
            await self._manager.load(request.model_name)
            return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: grpc.aio.ServicerContext[
            pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse
        ],
    ) -> pb.RepositoryModelUnloadResponse:
        """Takes a model out of service; what it accepted is answered."""
        async with self._boundary.answering("RepositoryModelUnload", context):
            _check_repository(request.repository_name)
            if unknown := sorted(set(request.parameters) - _UNLOAD_PARAMETERS):
                raise UnsupportedError(f"parameters: unload_dependents or none, got {unknown[0]!r}")
            await self._manager.unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequestError(f"repository_name: expected none, got {name!r}")
