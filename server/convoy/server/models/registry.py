"""The versions in service, found by name and version, and the leases that calls hold on them."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from convoy.server.backends.base import Backend
from convoy.server.backends.device import Runtime
from convoy.server.batching import BatchingLimits, DynamicBatcher, Health
from convoy.server.errors import ModelNotFoundError, UnavailableError
from convoy.server.metrics.batches import ModelStatistics
from convoy.server.metrics.requests import RequestMetrics, RunsOn
from convoy.server.models.manifest import Manifest
from convoy.server.models.readiness import Readiness, ServerState, readiness
from convoy.server.requests import Images, Prediction


class Batcher(Protocol):
    """The batcher of a version: a `DynamicBatcher`, or one in another process."""

    @property
    def limits(self) -> BatchingLimits:
        """The bounds of its queue and batches."""

    @property
    def health(self) -> Health:
        """Whether the model works at the moment."""

    async def infer(
        self,
        images: Images,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> Prediction:
        """Run images as `DynamicBatcher.infer` does."""


class Leases:
    """Counts the calls that use a version, so that it is unloaded only when none does."""

    def __init__(self) -> None:
        self._count = 0
        self._none_held = asyncio.Event()
        self._none_held.set()

    def acquire(self) -> "Lease":
        """Return a lease, which is held until its release."""
        self._count += 1
        self._none_held.clear()
        return Lease(self)

    async def wait_for_none(self) -> None:
        """Wait until no lease is held."""
        await self._none_held.wait()

    def _release(self) -> None:
        self._count -= 1
        if self._count == 0:
            self._none_held.set()


class Lease:
    """One call's claim on a version.

    Example:
        with model.lease():
            images = await decode(…)
            await model.batcher.infer(images)
    """

    __slots__ = ("_leases",)

    def __init__(self, leases: Leases) -> None:
        self._leases: Leases | None = leases

    def release(self) -> None:
        """End the claim; a second call changes nothing."""
        if self._leases:
            self._leases._release()
            self._leases = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """The view of a version in service for modules that answer requests.

    Attributes:
        manifest: The version's description.
        runtime: The runtime that `--backend` asked for.
        runs_on: The device and provider in use.
        batcher: Where its requests go.
        requests: Counts its requests.
        statistics: Returns the statistics of its batcher.
        leases: Counts the calls that use it.
        examples: Image files that show what it classifies.
    """

    manifest: Manifest
    runtime: Runtime
    runs_on: RunsOn
    batcher: Batcher
    requests: RequestMetrics
    statistics: Callable[[], Coroutine[Any, Any, ModelStatistics]]
    leases: Leases = field(default_factory=Leases)
    examples: tuple[bytes, ...] = ()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.version

    def lease(self) -> Lease:
        """Return a lease, which keeps the version loaded until its release."""
        return self.leases.acquire()


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel(ServedModel):
    """A version in service in the process that runs it.

    Attributes:
        backends: The model on each of its devices.
    """

    batcher: DynamicBatcher
    backends: Sequence[Backend] = ()

    def close(self) -> None:
        """Release the memory of a version whose batcher is drained.

        References to a version may outlive it, such as that of a caller that stalls.
        """
        for backend in self.backends:
            backend.close()


_OPEN_STATES = frozenset({ServerState.SERVING, ServerState.LAME_DUCK})


class Models(Protocol):
    """The view of the registry for modules that answer requests."""

    state: ServerState

    @property
    def readiness(self) -> Readiness:
        """What the server reports about itself at the moment."""

    @property
    def open(self) -> bool:
        """True while requests are answered."""

    def watch(self, callback: Callable[[], None]) -> None:
        """Call back, on the event loop, after each change of `state` or `readiness`."""

    def __iter__(self) -> Iterator[ServedModel]:
        """Iterate over all versions by name, then by number."""

    def find(self, name: str, version: int = 0) -> ServedModel:
        """Return the model for a request."""


Model = TypeVar("Model", bound=ServedModel)
Model_contra = TypeVar("Model_contra", bound=ServedModel, contravariant=True)


class RegistryObserver(Protocol[Model_contra]):
    """Receives the changes of a registry."""

    def version_added(self, model: Model_contra) -> None:
        """Handle a new version."""

    def default_changed(self, model: Model_contra) -> None:
        """Handle a version that now answers the requests that name none."""

    def version_removed(self, model: Model_contra) -> None:
        """Handle a version that is gone."""

    def health_changed(self, model: Model_contra) -> None:
        """Handle a change of a version's health."""

    def state_changed(self) -> None:
        """Handle a change of the server's state or of `reachable`."""


class ModelRegistry(Generic[Model]):
    """Maps names and versions to the models in service. It belongs to the event loop.

    A caller that finds a model and awaits anything before its batcher has the request must hold a
    lease (`ServedModel.lease`): the version may be replaced meanwhile, and without a lease it ends.
    """

    def __init__(self) -> None:
        self._defaults: dict[str, Model] = {}
        self._versions: dict[str, dict[int, Model]] = {}
        self._observers: list[RegistryObserver[Model]] = []
        self._watchers: list[Callable[[], None]] = []
        self._state = ServerState.STARTING
        self._reachable = True
        # Replaced, never changed: threads read it.
        self._readiness = self._derive()

    def subscribe(self, observer: RegistryObserver[Model]) -> None:
        """Report every change from now on to an observer."""
        self._observers.append(observer)

    def watch(self, callback: Callable[[], None]) -> None:
        """Call back, on the event loop, after each change of `state` or `readiness`."""
        self._watchers.append(callback)

    @property
    def state(self) -> ServerState:
        """The phase of the server's life."""
        return self._state

    @state.setter
    def state(self, state: ServerState) -> None:
        self._state = state
        self._state_changed()

    @property
    def reachable(self) -> bool:
        """Whether the processes that answer callers are there; otherwise nothing is ready."""
        return self._reachable

    @reachable.setter
    def reachable(self, reachable: bool) -> None:
        self._reachable = reachable
        self._state_changed()

    @property
    def readiness(self) -> Readiness:
        """What the server reports about itself at the moment; any thread may read it."""
        return self._readiness

    @property
    def open(self) -> bool:
        """True while requests are answered."""
        return self._state in _OPEN_STATES

    def add(self, model: Model) -> None:
        """Add a version, for requests that name it."""
        self._versions.setdefault(model.name, {})[model.version] = model
        for observer in self._observers:
            observer.version_added(model)
        self._changed()

    def make_default(self, model: Model) -> None:
        """Make a version the one that answers requests that name none."""
        self._defaults[model.name] = model
        for observer in self._observers:
            observer.default_changed(model)
        self._changed()

    def remove(self, model: Model) -> None:
        """Remove a version; no request finds it any more."""
        if self.get(model.name, model.version) is model:
            del self._versions[model.name][model.version]
            for observer in self._observers:
                observer.version_removed(model)
        if self._defaults.get(model.name) is model:
            del self._defaults[model.name]
        self._changed()

    def health_changed(self, model: Model) -> None:
        """Report a change of a version's health to the observers."""
        if self.get(model.name, model.version) is model:
            for observer in self._observers:
                observer.health_changed(model)
            self._changed()

    def default(self, name: str) -> Model | None:
        """Return the version that answers requests that name none."""
        return self._defaults.get(name)

    def get(self, name: str, version: int) -> Model | None:
        """Return one version."""
        return self._versions.get(name, {}).get(version)

    def versions(self, name: str) -> list[Model]:
        """Return a model's versions, oldest first."""
        versions = self._versions.get(name, {})
        return [versions[number] for number in sorted(versions)]

    def __iter__(self) -> Iterator[Model]:
        """Iterate over all versions by name, then by number."""
        return iter([model for name in sorted(self._versions) for model in self.versions(name)])

    def find(self, name: str, version: int = 0) -> Model:
        """Return the model for a request.

        Args:
            name: May be empty where exactly one model is served.
            version: 0 for the default version.

        Raises:
            UnavailableError: The server starts or drains.
            ModelNotFoundError: There is no such model or version.
        """
        if self._state not in _OPEN_STATES:
            raise UnavailableError("the server is starting or draining")
        if not name and len(self._defaults) == 1:
            name = next(iter(self._defaults))
        model = self._defaults.get(name) if not version else self.get(name, version)
        if model is None:
            raise self._not_found(name, version)
        return model

    def _state_changed(self) -> None:
        for observer in self._observers:
            observer.state_changed()
        self._changed()

    def _changed(self) -> None:
        self._readiness = self._derive()
        for callback in self._watchers:
            callback()

    def _derive(self) -> Readiness:
        return readiness(
            self._state,
            self._reachable,
            {(model.name, model.version): model.batcher.health for model in self},
            {name: model.version for name, model in self._defaults.items()},
        )

    def _not_found(self, name: str, version: int) -> ModelNotFoundError:
        if name not in self._defaults:
            served = ", ".join(sorted(self._defaults)) or "none"
            return ModelNotFoundError(f"model: expected one of {served}, got {name!r}")
        numbers = ", ".join(str(model.version) for model in self.versions(name))
        return ModelNotFoundError(
            f"version: model {name!r} is served in version {numbers}, got {version}"
        )
