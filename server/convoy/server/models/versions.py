"""Versions of a model: their states, the switch between them, and those that were rejected."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import structlog

from convoy.server.batching import Health
from convoy.server.errors import SignatureError, StartupError, UnreadableError
from convoy.server.metrics.requests import ModelMetrics, ServerMetrics
from convoy.server.models.registry import LoadedModel, ModelRegistry
from convoy.server.models.repository import Fingerprint, fingerprint

logger = structlog.get_logger()

# The wait before an unreadable version is loaded again; doubled each time.
_FIRST_RETRY_S = 2.0
_LAST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class RejectedVersion:
    """A version that is not served.

    Attributes:
        folder: NAME/VERSION.
        error: The reason; its traceback and those of its causes are removed, since they would
            keep the version in memory.
        files: The fingerprint of its files before they were read.
        retry_at_s: When to load it again although no file has changed; infinity for never.
        retry_after_s: How long that is after its rejection.
    """

    folder: Path
    error: StartupError
    files: Fingerprint
    retry_at_s: float = float("inf")
    retry_after_s: float = 0.0

    def __post_init__(self) -> None:
        _forget_tracebacks(self.error)

    @property
    def message(self) -> str:
        """The error with all its causes, in one line."""
        texts = [str(self.error)]
        cause = self.error.__cause__
        while cause is not None:
            texts.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__
        return " ".join(": ".join(texts).split())


class RejectedVersions:
    """Remembers rejected versions and logs each of them once.

    Args:
        metrics: Counts them.
        clock: In seconds.
        fingerprint: Of the repository: changes when a file of a version does.
    """

    def __init__(
        self,
        metrics: ModelMetrics,
        clock: Callable[[], float] = time.monotonic,
        fingerprint: Callable[[Path], Fingerprint] = fingerprint,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._fingerprint = fingerprint
        self._rejected: dict[Path, RejectedVersion] = {}
        self._repository_errors: dict[str, str] = {}

    def get(self, folder: Path) -> RejectedVersion | None:
        """Return the rejection of a version."""
        return self._rejected.get(folder)

    def still_holds(self, rejected: RejectedVersion) -> bool:
        """Return whether the files of a rejected version have not changed since.

        It reads the repository: call it on a thread.
        """
        if self._clock() >= rejected.retry_at_s:
            return False
        return rejected.files == self._fingerprint(rejected.folder)

    def add(self, folder: Path, error: StartupError, files: Fingerprint) -> RejectedVersion:
        """Remember that a version is rejected; log and count it unless that was done before."""
        before = self._rejected.get(folder)
        retry_after_s, retry_at_s = 0.0, float("inf")
        if isinstance(error, UnreadableError):
            self._metrics.repository_error(folder.parent.name, error.code)
            known_s = before.retry_after_s if before else 0.0
            retry_after_s = min(max(_FIRST_RETRY_S, 2 * known_s), _LAST_RETRY_S)
            retry_at_s = self._clock() + retry_after_s
        rejected = RejectedVersion(folder, error, files, retry_at_s, retry_after_s)
        self._rejected[folder] = rejected
        if before is None or (before.message, before.files) != (rejected.message, files):
            self._report(rejected)
        return rejected

    def _report(self, rejected: RejectedVersion) -> None:
        folder, error = rejected.folder, rejected.error
        self._metrics.rejected(folder.parent.name, error.reason)
        logger.error(
            "version rejected",
            model=folder.parent.name,
            version=int(folder.name),
            reason=error.reason,
            error=rejected.message,
        )

    def forget(self, folder: Path) -> None:
        """Forget the rejection of a version, so that it is loaded again."""
        self._rejected.pop(folder, None)

    def forget_model(self, model: Path) -> None:
        """Forget the rejections of a model's versions."""
        for folder in [folder for folder in self._rejected if folder.parent == model]:
            del self._rejected[folder]

    def forget_signatures(self) -> None:
        """Forget the rejections for a signature, after the key was read again."""
        for folder, rejected in list(self._rejected.items()):
            if isinstance(rejected.error, SignatureError):
                del self._rejected[folder]

    def repository_error(self, model: str, error: StartupError) -> None:
        """Log, once, why a model (the empty name: the repository) cannot be read."""
        if isinstance(error, UnreadableError):
            self._metrics.repository_error(model, error.code)
        if self._repository_errors.get(model) != str(error):
            self._repository_errors[model] = str(error)
            self._metrics.rejected(model, error.reason)
            logger.error("repository error", model=model, reason=error.reason, error=str(error))

    def repository_read(self, model: str) -> None:
        """Note that a model can be read again."""
        self._repository_errors.pop(model, None)


def _forget_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks of an error, of its causes and of those that it was raised during."""
    if error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        _forget_tracebacks(error.__cause__)
        _forget_tracebacks(error.__context__)


# How long calls may hold a lease on a version that was taken out of service. Calls are short; only
# a caller that stalls during one reaches this limit.
RETIREMENT_TIMEOUT_S = 60.0


class VersionState(Enum):
    """The states of a version, in the words of the protocol's repository index."""

    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version in the repository.

    Attributes:
        reason: Why it is not served, where that is known.
    """

    model: str
    version: int
    state: VersionState
    reason: str = ""


class VersionSwitch:
    """Puts versions into service and takes them out.

    Args:
        models: The registry to change.
        metrics: Counts the changes.
    """

    def __init__(self, models: ModelRegistry[LoadedModel], metrics: ServerMetrics) -> None:
        self._models = models
        self._metrics = metrics
        self._unloading: dict[asyncio.Task[None], LoadedModel] = {}

    def add(self, model: LoadedModel) -> None:
        """Start a version; from now on requests that name it are answered."""
        model.batcher.start(
            lambda health: self._health_changed(model, health),
            lambda size: _batch_size_changed(model, size),
            lambda preferred, largest: logger.info(
                "batch sizes corrected by the runs in service",
                model=model.name,
                version=model.version,
                preferred_batch_size=preferred,
                max_batch_size=largest,
            ),
        )
        self._models.add(model)
        self._metrics.models.serves(model.name, model.version, model.runs_on)

    def make_default(self, model: LoadedModel) -> None:
        """Make an added version answer the requests that name no version."""
        before = self._models.default(model.name)
        self._models.make_default(model)
        if before and before is not model:
            self._metrics.models.switched(model.name)
            logger.info("version switched", model=model.name, old=before.version, new=model.version)

    def retire(self, model: LoadedModel) -> None:
        """Take a version out of service; it answers the requests that it accepted, then ends."""
        self._models.remove(model)
        task = asyncio.create_task(self._unload(model))
        self._unloading[task] = model
        task.add_done_callback(self._unloading.pop)

    def roll_back(self, old: LoadedModel, new: LoadedModel, reason: str) -> None:
        """Take a version that failed its canary out of service."""
        self._metrics.models.rolled_back(new.name, reason)
        logger.error(
            "version rolled back",
            model=new.name,
            version=new.version,
            serving=old.version,
            reason=reason,
        )
        self.retire(new)

    def is_unloading(self, name: str, version: int) -> bool:
        """Return whether a retired version still answers requests that it accepted."""
        return any((m.name, m.version) == (name, version) for m in self._unloading.values())

    async def close(self) -> None:
        """Retire all versions and wait until they have ended."""
        for model in list(self._models):
            self.retire(model)
        await asyncio.gather(*self._unloading)

    def _health_changed(self, model: LoadedModel, health: Health) -> None:
        if health is Health.HEALTHY:
            logger.info("version is healthy again", model=model.name, version=model.version)
        else:
            logger.error(
                "version is not healthy",
                model=model.name,
                version=model.version,
                reason=health.value,
                error=model.batcher.fault,
            )
        self._models.health_changed(model)

    async def _unload(self, model: LoadedModel) -> None:
        model.batcher.stop_delaying()
        try:
            await asyncio.wait_for(model.leases.wait_for_none(), RETIREMENT_TIMEOUT_S)
        except TimeoutError:
            logger.warning(
                "version unloaded while calls use it",
                model=model.name,
                version=model.version,
                timeout_s=RETIREMENT_TIMEOUT_S,
            )
        await model.batcher.drain()
        # A hung run still uses the backend; its thread keeps it.
        if model.batcher.health is not Health.HUNG:
            model.close()
        model.requests.close()
        # A version that was loaded again meanwhile has the same labels.
        if self._models.get(model.name, model.version) is None:
            self._metrics.forget(model.name, model.version)
        logger.info("version unloaded", model=model.name, version=model.version)


def _batch_size_changed(model: LoadedModel, size: int) -> None:
    full_size = model.batcher.limits.max_batch_size
    event = "batches are smaller: a device has no memory for larger ones"
    if size == full_size:
        event = "batches have their full size again"
    logger.warning(
        event, model=model.name, version=model.version, max_batch_size=size, full_size=full_size
    )
