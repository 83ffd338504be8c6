"""The models in service, found by name and version."""

from collections.abc import Iterator
from enum import Enum

from server.errors import ModelNotFoundError, UnavailableError
from server.loading import ServedModel


class ServerState(Enum):
    """Where the server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    # Answers on, but asks to be sent nothing more.
    LAME_DUCK = "lame duck"
    DRAINING = "draining"


class ModelCatalogue:
    """Maps names to the version in service.

    Attributes:
        state: Requests are answered while it is SERVING or LAME_DUCK.
    """

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self.state = ServerState.STARTING

    @property
    def ready(self) -> bool:
        """True while every model is loaded and the server is not about to stop."""
        return self.state is ServerState.SERVING

    def add(self, model: ServedModel) -> None:
        """Puts a version into service in the place of any older one."""
        self._models[model.name] = model

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(sorted(self._models.values(), key=lambda model: model.name))

    def find(self, name: str, version: int = 0) -> ServedModel:
        """Returns the model for a request.

        Args:
            name: May be empty where exactly one model is served.
            version: 0 for the version in service.

        Raises:
            UnavailableError: The server starts or drains.
            ModelNotFoundError: There is no such model or version.
        """
        if self.state not in (ServerState.SERVING, ServerState.LAME_DUCK):
            raise UnavailableError("the server is starting or draining")
        if not name and len(self._models) == 1:
            name = next(iter(self._models))
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(
                f"model: expected one of {', '.join(sorted(self._models))}, got {name!r}"
            )
        if version not in (0, model.version):
            raise ModelNotFoundError(
                f"version: model {name!r} is served in version {model.version}, got {version}"
            )
        return model
