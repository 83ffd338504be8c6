"""The models in service, found by name and version."""

from collections.abc import Iterator
from enum import Enum
from typing import Generic, Protocol, TypeVar

from server.errors import ModelNotFoundError, UnavailableError
from server.served_model import ServedModel


class ServerState(Enum):
    """Where the server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    # Answers on, but asks to be sent nothing more.
    LAME_DUCK = "lame duck"
    DRAINING = "draining"


class Models(Protocol):
    """What those see of a catalogue who answer requests."""

    state: ServerState

    @property
    def ready(self) -> bool:
        """True while every model is loaded and the server is not about to stop."""

    @property
    def open(self) -> bool:
        """True while requests are answered."""

    def __iter__(self) -> Iterator[ServedModel]:
        """Goes through all versions by name, then by number."""

    def find(self, name: str, version: int = 0) -> ServedModel:
        """Returns the model for a request."""


Model = TypeVar("Model", bound=ServedModel)
Model_contra = TypeVar("Model_contra", bound=ServedModel, contravariant=True)


class Follower(Protocol[Model_contra]):
    """Is told what changes in a catalogue."""

    def admitted(self, model: Model_contra) -> None:
        """There is a version more."""

    def made_default(self, model: Model_contra) -> None:
        """A version answers requests that name none."""

    def removed(self, model: Model_contra) -> None:
        """There is a version less."""


class ModelCatalogue(Generic[Model]):
    """Maps names and versions to what answers them. It belongs to the event loop.

    Whoever finds a model and awaits anything before its batcher has the request must hold it
    (`ServedModel.users`): a swap may happen meanwhile, and only what is not held ends.

    Attributes:
        state: Where the server is in its life.
    """

    def __init__(self) -> None:
        self._defaults: dict[str, Model] = {}
        self._versions: dict[str, dict[int, Model]] = {}
        self._followers: list[Follower[Model]] = []
        self.state = ServerState.STARTING

    def follow(self, follower: Follower[Model]) -> None:
        """Tells somebody of every change from here on."""
        self._followers.append(follower)

    @property
    def ready(self) -> bool:
        """True while every model is loaded and the server is not about to stop."""
        return self.state is ServerState.SERVING

    @property
    def open(self) -> bool:
        """True while requests are answered."""
        return self.state in (ServerState.SERVING, ServerState.LAME_DUCK)

    def add(self, model: Model) -> None:
        """Lets requests that name this version find it."""
        self._versions.setdefault(model.name, {})[model.version] = model
        for follower in self._followers:
            follower.admitted(model)

    def make_default(self, model: Model) -> None:
        """Lets requests that name no version find this one from now on."""
        self._defaults[model.name] = model
        for follower in self._followers:
            follower.made_default(model)

    def remove(self, model: Model) -> None:
        """Lets nobody find a version any more."""
        if self.get(model.name, model.version) is model:
            del self._versions[model.name][model.version]
            for follower in self._followers:
                follower.removed(model)
        if self._defaults.get(model.name) is model:
            del self._defaults[model.name]

    def default(self, name: str) -> Model | None:
        """Returns what answers requests that name no version."""
        return self._defaults.get(name)

    def get(self, name: str, version: int) -> Model | None:
        """Returns one version."""
        return self._versions.get(name, {}).get(version)

    def versions(self, name: str) -> list[Model]:
        """Returns a model's versions, oldest first."""
        versions = self._versions.get(name, {})
        return [versions[number] for number in sorted(versions)]

    def __iter__(self) -> Iterator[Model]:
        """Goes through all versions by name, then by number."""
        return iter([model for name in sorted(self._versions) for model in self.versions(name)])

    def find(self, name: str, version: int = 0) -> Model:
        """Returns the model for a request.

        Args:
            name: May be empty where exactly one model is served.
            version: 0 for the one in service by default.

        Raises:
            UnavailableError: The server starts or drains.
            ModelNotFoundError: There is no such model or version.
        """
        if not self.open:
            raise UnavailableError("the server is starting or draining")
        if not name and len(self._defaults) == 1:
            name = next(iter(self._defaults))
        model = self.get(name, version) if version else self._defaults.get(name)
        if model is None:
            raise self._not_found(name, version)
        return model

    def _not_found(self, name: str, version: int) -> ModelNotFoundError:
        if name not in self._defaults:
            served = ", ".join(sorted(self._defaults)) or "none"
            return ModelNotFoundError(f"model: expected one of {served}, got {name!r}")
        numbers = ", ".join(str(model.version) for model in self.versions(name))
        return ModelNotFoundError(
            f"version: model {name!r} is served in version {numbers}, got {version}"
        )
