"""Update the models in service from the repository while the server answers requests.

The manager loads and checks a new version while the current version serves. A good one replaces it
in one step between two requests; the old version answers the requests that it accepted, then ends.
A bad one is rejected until its files change, and the current version keeps serving.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import structlog

from convoy.server.batching import Health
from convoy.server.errors import (
    CanaryError,
    DeviceError,
    LoadTimeoutError,
    ModelNotFoundError,
    RepositoryError,
    StartupError,
    UnavailableError,
)
from convoy.server.models.background import in_thread
from convoy.server.models.canary import Canaries, CanaryLimits, CanaryTrial, Verdict, VerdictRecords
from convoy.server.models.loader import ModelLoader
from convoy.server.models.policy import Promotion, ServingPlan, VersionPolicy
from convoy.server.models.registry import LoadedModel, ModelRegistry
from convoy.server.models.repository import ModelFolder, ModelRepository
from convoy.server.models.versions import (
    RejectedVersion,
    RejectedVersions,
    VersionState,
    VersionStatus,
    VersionSwitch,
)

logger = structlog.get_logger()

# How long a load waits for another one to end: loading must leave processors for requests, but a
# hung load must not block the others.
_TURN_TIMEOUT_S = 10.0
# How long the start waits for slow models once others are in service.
_START_PATIENCE_S = 60.0

Update = asyncio.Task[list[RejectedVersion]]


class ModelManager:
    """Loads, switches and unloads versions.

    Each model has its own update task, so that none waits for another.

    Args:
        repository: The model repository.
        policy: Chooses the versions.
        loader: Loads a version.
        models: The registry of the models in service.
        switch: Puts versions into service.
        rejections: Remembers rejected versions.
        canary: The limits of a canary; None to switch without one.
        verdicts: Remembers the verdicts of canaries over restarts; None remembers none.
        load_timeout_s: How long loading a version may take.
        exit_on_error: Whether the start fails if any model has no version that loads.

    Example:
        manager = ModelManager(repository, policy, loader, models=…, switch=…, rejections=…)
        await manager.start()
        polling = asyncio.create_task(manager.poll(every_s=2))
        …
        await manager.close()
    """

    def __init__(
        self,
        repository: ModelRepository,
        policy: VersionPolicy,
        loader: ModelLoader,
        *,
        models: ModelRegistry[LoadedModel],
        switch: VersionSwitch,
        rejections: RejectedVersions,
        canary: CanaryLimits | None = None,
        verdicts: VerdictRecords | None = None,
        load_timeout_s: float = 600.0,
        exit_on_error: bool = False,
    ) -> None:
        self._repository = repository
        self._policy = policy
        self._loader = loader
        self._models = models
        self._switch = switch
        self._rejections = rejections
        self._canaries = Canaries(canary, self._decide)
        self._verdicts = verdicts
        self._load_timeout_s = load_timeout_s
        self._exit_on_error = exit_on_error
        self._turn = asyncio.Semaphore(1)
        self._updates: dict[str, Update] = {}
        self._promotions: dict[str, Promotion | RepositoryError | None] = {}
        self._unloaded: set[str] = set()
        self._loading: set[Path] = set()

    async def start(self) -> None:
        """Put the models of the repository into service.

        A model without a version that loads, or an empty repository, does not end the start, unless
        `exit_on_error` says so: the server waits for a good version.

        Raises:
            StartupError: The repository is not a folder, or the device cannot be used; or with
                `exit_on_error`, a model has no version that loads, or there is no model.
        """
        await in_thread(self._repository.check_exists)
        if self._exit_on_error:
            for folder in await in_thread(self._repository.models):
                if promotion := await in_thread(folder.promotion):
                    folder.check(promotion)
        updates = await self._begin_updates()
        patience_s = None if self._exit_on_error else _START_PATIENCE_S
        while updates:
            done, updates = await asyncio.wait(updates, timeout=patience_s)
            for update in done:
                self._check_start(update.result())
            if updates and any(self._models):
                logger.warning("models still load", count=len(updates))
                break
        if any(self._models):
            return
        if self._exit_on_error:
            raise RepositoryError("repository: the version policy chooses no version of any model")
        logger.warning("no model is in service yet")

    async def poll(self, every_s: float) -> None:
        """Scan the repository at an interval until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._begin_updates()
            except Exception:  # the loaded models keep serving in any case
                logger.exception("reading the repository failed")

    async def refresh(self) -> None:
        """Scan the repository once, and return when the changes are applied."""
        if updates := await self._begin_updates():
            await asyncio.wait(updates)

    async def reload(self) -> None:
        """Scan the repository once, and check versions again whose signature was rejected."""
        self._rejections.forget_signatures()
        await self.refresh()

    async def load(self, name: str) -> None:
        """Update a model at once; load rejected and unloaded versions again.

        Raises:
            ModelNotFoundError: The repository has no such model.
            UnavailableError: The wanted version does not load; the message says why.
        """
        folder, promotion = await self._find(name)
        await self._end_update(name)
        self._unloaded.discard(name)
        self._rejections.forget_model(folder.path)
        if self._verdicts:
            for version in folder.versions:
                await in_thread(self._verdicts.forget, folder.version(version))
        # The update continues if the caller cancels.
        rejected = await asyncio.shield(self._begin_update(folder, promotion))
        if rejected:
            raise UnavailableError(rejected[0].message)

    async def unload(self, name: str) -> None:
        """Take a model out of service until `load` names it.

        Raises:
            ModelNotFoundError: No such model is served.
        """
        if self._models.default(name) is None and name not in self._updates:
            raise ModelNotFoundError(f"model: {name!r} is not served")
        self._unloaded.add(name)
        await self._end_update(name)
        self._canaries.end(name)
        self._keep(name, ())

    async def index(self) -> list[VersionStatus]:
        """Return every version in the repository, sorted by name and version."""
        try:
            folders = await in_thread(self._repository.models)
        except RepositoryError:
            folders = []
        known = {(folder.name, v): folder.version(v) for folder in folders for v in folder.versions}
        return [self._status(name, version, path) for (name, version), path in known.items()]

    async def close(self) -> None:
        """End every model; accepted requests are answered first."""
        self._canaries.close()
        for name in list(self._updates):
            await self._end_update(name)
        await self._switch.close()

    def _check_start(self, rejected: list[RejectedVersion]) -> None:
        for each in rejected:
            if self._models.default(each.folder.parent.name):
                continue
            if self._exit_on_error or isinstance(each.error, DeviceError):
                raise each.error

    async def _find(self, name: str) -> tuple[ModelFolder, Promotion | RepositoryError | None]:
        for folder, promotion in await in_thread(self._look):
            if folder.name == name:
                return folder, promotion
        raise ModelNotFoundError(f"model: the repository has none named {name!r}")

    def _look(self) -> list[tuple[ModelFolder, Promotion | RepositoryError | None]]:
        return [(folder, _promotion(folder)) for folder in self._repository.models()]

    async def _begin_updates(self) -> set[Update]:
        """Scan the repository, and start to update each model."""
        try:
            found = await in_thread(self._look)
        except RepositoryError as error:
            # The volume is probably not mounted.
            self._rejections.repository_error("", error)
            return set()
        self._rejections.repository_read("")
        updates = set()
        for folder, promotion in found:
            if folder.name not in self._unloaded:
                before = self._promotions.get(folder.name, promotion)
                old, new = _promoted(before), _promoted(promotion)
                if old != new:
                    logger.info("promotion changed", model=folder.name, old=old, new=new)
                if before != promotion:
                    # A rollback does not wait for what is being loaded.
                    await self._end_update(folder.name)
                updates.add(self._begin_update(folder, promotion))
            # Let requests run, however many models there are.
            await asyncio.sleep(0)
        present = {folder.name for folder, _ in found}
        for name in {*self._updates, *(model.name for model in self._models)} - present:
            await self._end_update(name)
            self._keep(name, ())
        return updates

    def _begin_update(
        self, folder: ModelFolder, promotion: Promotion | RepositoryError | None
    ) -> Update:
        """Start to update a model, unless an update runs."""
        if running := self._updates.get(folder.name):
            return running
        update = asyncio.create_task(self._update(folder, promotion))
        self._updates[folder.name] = update
        self._promotions[folder.name] = promotion
        update.add_done_callback(lambda done: self._update_ended(folder.name, done))
        return update

    def _update_ended(self, name: str, update: Update) -> None:
        if self._updates.get(name) is update:
            del self._updates[name]
        if not update.cancelled() and (error := update.exception()):
            logger.error("updating a model failed", model=name, exc_info=error)

    async def _end_update(self, name: str) -> None:
        """Cancel the update of a model; a load in it is abandoned."""
        if update := self._updates.pop(name, None):
            update.cancel()
            await asyncio.wait({update})

    async def _update(
        self, folder: ModelFolder, promotion: Promotion | RepositoryError | None
    ) -> list[RejectedVersion]:
        """Update a model from the repository; return the versions that were rejected now."""
        if folder.error:
            self._rejections.repository_error(folder.name, folder.error)
            return []
        if isinstance(promotion, RepositoryError):
            self._rejections.repository_error(folder.name, promotion)
            return []
        try:
            if promotion:
                folder.check(promotion)
            self._rejections.repository_read(folder.name)
        except RepositoryError as error:
            # The version in service, or one that was promoted before, takes its place.
            self._rejections.repository_error(folder.name, error)
        return await self._reconcile(folder, self._policy.plan(folder.versions, promotion))

    async def _reconcile(self, folder: ModelFolder, plan: ServingPlan) -> list[RejectedVersion]:
        """Update one model by its plan; return the versions that were rejected now."""
        rejected: list[RejectedVersion] = []
        wanted = await self._first_good(folder, plan.default, rejected)
        current = self._models.default(folder.name)
        if wanted is None and plan.default:
            stays = current is not None and current.version in folder.versions
            fallback = () if stays else plan.fallback
            wanted = current if stays else await self._first_good(folder, fallback, rejected)
        if wanted is None:
            self._canaries.end(folder.name)
            self._keep(folder.name, ())
            return rejected
        if self._models.default(folder.name) is None and self._canaries.enabled:
            await self._serve_older(folder, plan, wanted, rejected)
        keep = [*self._switch_to(self._models.default(folder.name), wanted)]
        others = 0
        for version in plan.beside(wanted.version):
            if others == plan.others:
                break
            if other := await self._first_good(folder, (version,), rejected):
                keep.append(other)
                others += 1
        self._keep(folder.name, keep)
        return rejected

    async def _serve_older(
        self,
        folder: ModelFolder,
        plan: ServingPlan,
        wanted: LoadedModel,
        rejected: list[RejectedVersion],
    ) -> None:
        """At the start, serve the last good version before one that never passed its canary."""
        if await self._recorded(folder.version(wanted.version)):
            return
        versions = dict.fromkeys([*plan.fallback, *plan.newest_first])
        older = [version for version in versions if version < wanted.version]
        if model := await self._first_good(folder, older, rejected):
            self._switch.make_default(model)

    def _switch_to(
        self, current: LoadedModel | None, wanted: LoadedModel
    ) -> tuple[LoadedModel, ...]:
        """Switch to a version, at once or after a trial; return the versions needed until then."""
        if current is wanted:
            self._canaries.end(wanted.name)
        elif current and self._canaries.start(current, wanted):
            return current, wanted
        else:
            self._switch.make_default(wanted)
        return (wanted,)

    async def _decide(self, trial: CanaryTrial, verdict: Verdict) -> None:
        new = trial.new
        folder = self._repository.version_folder(new.name, new.version)
        await self._end_update(new.name)
        files = await in_thread(self._repository.fingerprint, folder)
        served = self._models.get(new.name, new.version)
        if served is not new or self._models.default(new.name) is not trial.old:
            return
        if verdict is Verdict.GOOD and new.batcher.health is not Health.HEALTHY:
            verdict = Verdict.UNHEALTHY
        if verdict is Verdict.GOOD:
            self._switch.make_default(new)
        else:
            error = CanaryError(f"the canary failed: {verdict.value}")
            self._rejections.add(folder, error, files)
            self._switch.roll_back(trial.old, new, verdict.value)
        if self._verdicts:
            await in_thread(self._verdicts.record, folder, verdict)
        # The rest of the plan, such as the end of the old version.
        await self.refresh()

    async def _first_good(
        self, folder: ModelFolder, versions: Iterable[int], rejected: list[RejectedVersion]
    ) -> LoadedModel | None:
        for version in versions:
            model = self._models.get(folder.name, version)
            # A promoted version may have been removed.
            if model is None and version in folder.versions:
                model = await self._load(folder.version(version), rejected)
            if model is not None:
                return model
        return None

    async def _load(self, path: Path, rejected: list[RejectedVersion]) -> LoadedModel | None:
        known = self._rejections.get(path)
        if known is not None and await in_thread(self._rejections.still_holds, known):
            return None
        files = await in_thread(self._repository.fingerprint, path)
        verdict = await self._recorded(path)
        if verdict and verdict is not Verdict.GOOD:
            error = CanaryError(f"the canary failed in an earlier trial: {verdict.value}")
            rejected.append(self._rejections.add(path, error, files))
            return None
        self._loading.add(path)
        logger.info("loading", model=path.parent.name, version=int(path.name))
        try:
            # Before its turn and its time limit: each read from a store has a limit of its own.
            await in_thread(self._repository.fetch, path)
            model = await self._load_in_time(path)
        except Exception as error:  # no exception of a version may end the server
            rejected.append(self._rejections.add(path, _as_startup_error(path, error), files))
            return None
        finally:
            self._loading.discard(path)
        self._rejections.forget(path)
        self._switch.add(model)
        return model

    async def _recorded(self, path: Path) -> Verdict | None:
        """Return the verdict of an earlier canary on a version."""
        return await in_thread(self._verdicts.find, path) if self._verdicts else None

    async def _load_in_time(self, path: Path) -> LoadedModel:
        """Load a version; loads run one at a time as long as they end.

        Raises:
            LoadTimeoutError: It took too long; its thread is abandoned.
        """
        has_turn = await self._wait_for_turn()
        try:
            async with asyncio.timeout(self._load_timeout_s):
                read, load = self._repository.read, self._loader.load
                return await in_thread(read, path, load, discard=LoadedModel.close)
        except TimeoutError as error:
            raise LoadTimeoutError(
                f"model {path.parent.name!r} version {path.name}: loading took more than "
                f"{self._load_timeout_s:g} s"
            ) from error
        finally:
            if has_turn:
                self._turn.release()

    async def _wait_for_turn(self) -> bool:
        try:
            async with asyncio.timeout(_TURN_TIMEOUT_S):
                return await self._turn.acquire()
        except TimeoutError:
            return False

    def _keep(self, name: str, models: Iterable[LoadedModel]) -> None:
        for model in self._models.versions(name):
            if model not in models:
                self._switch.retire(model)

    def _status(self, name: str, version: int, path: Path) -> VersionStatus:
        if model := self._models.get(name, version):
            # An unhealthy version is not ready, although it is loaded.
            fault = model.batcher.fault
            state = VersionState.UNAVAILABLE if fault else VersionState.READY
            return VersionStatus(name, version, state, fault)
        if path in self._loading:
            return VersionStatus(name, version, VersionState.LOADING)
        if self._switch.is_unloading(name, version):
            return VersionStatus(name, version, VersionState.UNLOADING)
        if rejection := self._rejections.get(path):
            reason = rejection.message
        elif name in self._unloaded:
            reason = "unloaded by request"
        else:
            reason = "not chosen by the version policy"
        return VersionStatus(name, version, VersionState.UNAVAILABLE, reason)


def _promotion(folder: ModelFolder) -> Promotion | RepositoryError | None:
    try:
        return folder.promotion()
    except RepositoryError as error:
        return error


def _promoted(promotion: Promotion | RepositoryError | None) -> int | str | None:
    """Return the version, for the log; the error where it cannot be read."""
    if isinstance(promotion, RepositoryError):
        return str(promotion)
    return promotion.version if promotion else None


def _as_startup_error(path: Path, error: Exception) -> StartupError:
    if isinstance(error, StartupError):
        return error
    logger.debug("unexpected error while loading", exc_info=error)
    unknown = StartupError(f"model {path.parent.name!r} version {path.name}: unexpected error")
    unknown.__cause__ = error
    return unknown
