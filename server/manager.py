"""Keeps the models in service in step with the repository, while requests are answered.

A new version is loaded and checked beside the one that serves. Only a good one takes its place, in
one step between two requests; the old one then answers what it had accepted and ends. A bad one is
refused, once, until its files change; the old one serves on.
"""

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from server.canary import Canaries, CanaryLimits, CanaryTrial, Verdict
from server.catalogue import ModelCatalogue
from server.errors import (
    CanaryError,
    ModelNotFoundError,
    RepositoryError,
    StartupError,
    UnavailableError,
)
from server.loading import ModelLoader
from server.policy import Promotion, ServingPlan, VersionPolicy
from server.refusals import Refusal, Refusals
from server.repository import ModelFolder, ModelRepository, fingerprint
from server.rollout import Rollout
from server.served_model import LoadedModel
from server.version_state import VersionState, VersionStatus

logger = structlog.get_logger()


class ModelManager:
    """Loads, swaps and unloads versions.

    Example:
        manager = ModelManager(repository, policy, loader, catalogue=…, rollout=…, refusals=…)
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
        catalogue: ModelCatalogue[LoadedModel],
        rollout: Rollout,
        refusals: Refusals,
        canary: CanaryLimits | None = None,
    ) -> None:
        self._repository = repository
        self._policy = policy
        self._loader = loader
        self._catalogue = catalogue
        self._rollout = rollout
        self._refusals = refusals
        self._canaries = Canaries(canary, self._settle)
        # One version at a time: loading must leave processors to serving.
        self._loader_thread = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
        self._changing = asyncio.Lock()
        self._unloaded: set[str] = set()
        self._loading: Path | None = None

    async def start(self) -> None:
        """Brings every model of the repository into service.

        Raises:
            StartupError: There is none, or one of them has no version that can be served.
        """
        for folder in await asyncio.to_thread(self._repository.models):
            plan = self._policy.plan(folder.versions, folder.promotion())
            refused = await self._reconcile(folder, plan)
            if refused and self._catalogue.default(folder.name) is None:
                raise refused[0].error
            self._report(refused)
        if not any(self._catalogue):
            raise RepositoryError("repository: the version policy chooses no version of any model")

    async def poll(self, every_s: float) -> None:
        """Looks for changes at an interval until it is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception:  # whatever is wrong with the repository, what is loaded serves on
                logger.exception("looking into the repository failed")

    async def refresh(self) -> None:
        """Looks for changes once."""
        async with self._changing:
            try:
                found = await asyncio.to_thread(self._look)
            except RepositoryError as error:
                # Rather a volume that is not mounted than the wish to serve nothing.
                self._refusals.complain("", error)
                return
            self._refusals.settle("")
            present = {folder.name for folder, _ in found}
            for folder, promotion in found:
                if folder.name not in self._unloaded:
                    await self._refresh_model(folder, promotion)
                # Requests come first, however many models there are.
                await asyncio.sleep(0)
            for name in {model.name for model in self._catalogue} - present:
                self._keep(name, ())

    async def load(self, name: str) -> None:
        """Brings a model in step at once; what was refused or unloaded is tried again.

        Raises:
            ModelNotFoundError: The repository has no such model.
            UnavailableError: The version that is wanted cannot be served; the message says why.
        """
        async with self._changing:
            folder = await self._folder(name)
            self._unloaded.discard(name)
            self._refusals.withdraw_all(folder.path)
            refused = await self._refresh_model(folder, await asyncio.to_thread(_promotion, folder))
            if refused:
                raise UnavailableError(str(refused[0].error))

    async def unload(self, name: str) -> None:
        """Takes a model out of service until it is loaded by request.

        Raises:
            ModelNotFoundError: No such model is served.
        """
        async with self._changing:
            if self._catalogue.default(name) is None:
                raise ModelNotFoundError(f"model: {name!r} is not served")
            self._unloaded.add(name)
            self._keep(name, ())

    async def index(self) -> list[VersionStatus]:
        """Returns every version in the repository, sorted by name and version."""
        try:
            folders = await asyncio.to_thread(self._repository.models)
        except RepositoryError:
            folders = []
        known = {(folder.name, v): folder.version(v) for folder in folders for v in folder.versions}
        return [self._status(name, version, path) for (name, version), path in known.items()]

    async def close(self) -> None:
        """Ends every model; accepted requests are answered first."""
        self._canaries.close()
        self._loader_thread.shutdown(wait=False, cancel_futures=True)
        await self._rollout.close()

    async def _folder(self, name: str) -> ModelFolder:
        for folder in await asyncio.to_thread(self._repository.models):
            if folder.name == name:
                return folder
        raise ModelNotFoundError(f"model: the repository has none named {name!r}")

    def _look(self) -> list[tuple[ModelFolder, Promotion | RepositoryError | None]]:
        return [(folder, _promotion(folder)) for folder in self._repository.models()]

    async def _refresh_model(
        self, folder: ModelFolder, promotion: Promotion | RepositoryError | None
    ) -> list[Refusal]:
        if isinstance(promotion, RepositoryError):
            self._refusals.complain(folder.name, promotion)
            return []
        self._refusals.settle(folder.name)
        plan = self._policy.plan(folder.versions, promotion)
        refused = await self._reconcile(folder, plan)
        self._report(refused)
        return refused

    async def _reconcile(self, folder: ModelFolder, plan: ServingPlan) -> list[Refusal]:
        """Brings one model in step with its plan; returns what was refused just now."""
        refused: list[Refusal] = []
        current = self._catalogue.default(folder.name)
        wanted = await self._first_good(folder, plan.default, refused)
        if wanted is None and plan.default:
            stays = current is not None and current.version in folder.versions
            fallback = () if stays else plan.fallback
            wanted = current if stays else await self._first_good(folder, fallback, refused)
        if wanted is None:
            self._canaries.end(folder.name)
            self._keep(folder.name, ())
            return refused
        keep = [*self._decide(current, wanted)]
        others = 0
        for version in plan.beside(wanted.version):
            if others == plan.others:
                break
            if other := await self._first_good(folder, (version,), refused):
                keep.append(other)
                others += 1
        self._keep(folder.name, keep)
        return refused

    def _decide(self, current: LoadedModel | None, wanted: LoadedModel) -> tuple[LoadedModel, ...]:
        """Lets a version take over, at once or after a trial; returns what is needed until then."""
        if current is wanted:
            self._canaries.end(wanted.name)
        elif current and self._canaries.tries(current, wanted):
            return current, wanted
        else:
            self._rollout.swap(wanted)
        return (wanted,)

    async def _settle(self, trial: CanaryTrial, verdict: Verdict) -> None:
        async with self._changing:
            new = trial.new
            served = self._catalogue.get(new.name, new.version)
            if served is not new or self._catalogue.default(new.name) is not trial.old:
                return
            if verdict is Verdict.GOOD:
                self._rollout.swap(new)
            else:
                folder = self._repository.version_folder(new.name, new.version)
                error = CanaryError(f"the canary showed {verdict.value}")
                files = await asyncio.to_thread(fingerprint, folder)
                self._refusals.add(Refusal(folder, error, files))
                self._rollout.roll_back(trial.old, new, verdict.value)
        # What else the plan has, such as the end of the old version.
        await self.refresh()

    async def _first_good(
        self, folder: ModelFolder, versions: Iterable[int], refused: list[Refusal]
    ) -> LoadedModel | None:
        for version in versions:
            model = self._catalogue.get(folder.name, version)
            if model is None:
                model = await self._load(folder.version(version), refused)
            if model is not None:
                return model
        return None

    async def _load(self, path: Path, refused: list[Refusal]) -> LoadedModel | None:
        if await asyncio.to_thread(self._refusals.still_holds, path):
            return None
        files = await asyncio.to_thread(fingerprint, path)
        self._loading = path
        try:
            model = await self._in_loader(path)
        except Exception as error:  # whatever a version brings, it must not end the server
            refusal = Refusal(path, _as_startup_error(path, error), files)
            self._refusals.add(refusal)
            refused.append(refusal)
            return None
        finally:
            self._loading = None
        self._refusals.withdraw(path)
        self._rollout.admit(model)
        return model

    def _keep(self, name: str, models: Iterable[LoadedModel]) -> None:
        for model in self._catalogue.versions(name):
            if model not in models:
                self._rollout.retire(model)

    def _report(self, refused: list[Refusal]) -> None:
        for refusal in refused:
            self._refusals.report(refusal)

    def _status(self, name: str, version: int, path: Path) -> VersionStatus:
        if self._catalogue.get(name, version):
            return VersionStatus(name, version, VersionState.READY)
        if path == self._loading:
            return VersionStatus(name, version, VersionState.LOADING)
        if self._rollout.is_retiring(name, version):
            return VersionStatus(name, version, VersionState.UNLOADING)
        if refusal := self._refusals.get(path):
            reason = str(refusal.error)
        elif name in self._unloaded:
            reason = "unloaded by request"
        else:
            reason = "not chosen by the version policy"
        return VersionStatus(name, version, VersionState.UNAVAILABLE, reason)

    async def _in_loader(self, path: Path) -> LoadedModel:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader_thread, self._loader.load, path)


def _promotion(folder: ModelFolder) -> Promotion | RepositoryError | None:
    try:
        return folder.promotion()
    except RepositoryError as error:
        return error


def _as_startup_error(path: Path, error: Exception) -> StartupError:
    if isinstance(error, StartupError):
        return error
    logger.debug("unexpected error while loading", exc_info=error)
    unknown = StartupError(f"model {path.parent.name!r} version {path.name}: {error!r}")
    unknown.__cause__ = error
    return unknown
