"""Canary: mirror a share of the live requests to a new version before switching to it.

During a trial the old version answers every caller. The new version runs a share of the answered
requests too, and the trial compares errors, run times and predicted classes. A bad version costs
device time, but no request fails. Missing evidence is not a pass: a trial without enough mirrored
requests continues, and a run that does not finish counts as an error.

The verdict is recorded and outlives the process: after a restart a rolled-back version stays rolled
back, and one that passed needs no second trial.
"""

import asyncio
import contextlib
import hashlib
import os
import statistics
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import numpy as np
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf import json_format
from numpy.typing import NDArray

from convoy.server.batching import Health
from convoy.server.errors import InferenceError, RepositoryError, RequestError, UnavailableError
from convoy.server.models.manifest import SCHEMA_VERSION, one_line, parse_record
from convoy.server.models.registry import LoadedModel
from convoy.server.models.repository import read_manifest_bytes, read_small, repository_of
from convoy.server.models.signing import sign_record, verify_record
from convoy.server.requests import Images, Outputs, Prediction
from convoy.v1 import model_manifest_pb2 as pb

logger = structlog.get_logger()

# Mirrored requests in flight; further ones are not mirrored, so that no work piles up.
_MAX_IN_FLIGHT = 8
# The number of runs kept per batch size, and the fewest for a median.
_RUNS_KEPT = 200
_RUNS_NEEDED = 5
# With fewer runs, only a version that is this many times slower than the limit is rolled back.
_OBVIOUS = 10.0
# A mirrored request that takes longer counts as an error.
_MIRRORED_TIMEOUT_S = 10.0


class Verdict(Enum):
    """The result of a trial; the values are the label `reason` of convoy_rollbacks_total."""

    GOOD = "good"
    UNHEALTHY = "unhealthy"
    ERRORS = "errors"
    LATENCY = "latency"
    DISAGREEMENT = "disagreement"


@dataclass(frozen=True, slots=True)
class CanaryLimits:
    """The limits of a trial.

    Attributes:
        share: The share of the requests to mirror; above 0, up to 1.
        requests: How many mirrored requests make a verdict.
        timeout_s: After this time the requests so far may roll the version back; otherwise the
            trial continues.
        max_error_ratio: The share of them that may fail.
        max_slowdown: How many times as long as those of the old version its runs may take.
        max_disagreement: The share of the images that it may predict another class for.
    """

    share: float
    requests: int = 200
    timeout_s: float = 300.0
    max_error_ratio: float = 0.01
    max_slowdown: float = 1.5
    max_disagreement: float = 0.1


class CanaryTrial:
    """The trial of one version.

    Example:
        trial = CanaryTrial(old, new, limits)
        verdict = await trial.run()
    """

    def __init__(self, old: LoadedModel, new: LoadedModel, limits: CanaryLimits) -> None:
        self.old = old
        self.new = new
        self._limits = limits
        self._credit = 0.0
        self._requests = 0
        self._errors = 0
        self._images = 0
        self._disagreeing = 0
        self._old_runs_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_RUNS_KEPT))
        self._new_runs: deque[tuple[int, float]] = deque(maxlen=limits.requests)
        self._in_flight: set[asyncio.Task[None]] = set()
        self._run_timeout_s = min(_MIRRORED_TIMEOUT_S, limits.timeout_s)
        self._decided = asyncio.Event()

    async def run(self) -> Verdict:
        """Mirror the old version's requests until there is a verdict."""
        try:
            with self.old.batcher.mirror_to(self._mirror):
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._limits.timeout_s):
                            await self._decided.wait()
                    if verdict := self._verdict():
                        return verdict
                    self._decided.clear()
                    logger.info(
                        "canary continues",
                        model=self.new.name,
                        version=self.new.version,
                        requests=self._requests,
                    )
        finally:
            for task in self._in_flight:
                task.cancel()

    def _mirror(self, images: Images, prediction: Prediction) -> None:
        self._old_runs_s[prediction.batch_size].append(prediction.inference_s)
        self._credit = min(1.0, self._credit + self._limits.share)
        if self._credit >= 1.0 and len(self._in_flight) < _MAX_IN_FLIGHT:
            self._credit -= 1.0
            # A copy: the caller may reuse its buffer once it has the answer.
            task = asyncio.create_task(self._run_new(images.copy(), prediction.outputs))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    async def _run_new(self, images: Images, expected: Outputs) -> None:
        try:
            async with asyncio.timeout(self._run_timeout_s):
                answer = await self.new.batcher.infer(images)
        except (InferenceError, UnavailableError, TimeoutError):
            # The model failed, the device hangs, or the run does not finish.
            self._errors += 1
        except RequestError:  # its queue is full, which says nothing about the version
            return
        else:
            self._new_runs.append((answer.batch_size, answer.inference_s))
            self._images += len(images)
            differs = _classes(self.old, expected) != _classes(self.new, answer.outputs)
            self._disagreeing += int(differs.sum())
        self._requests += 1
        hopeless = self._errors > self._limits.max_error_ratio * self._limits.requests
        if hopeless or self._requests >= self._limits.requests:
            self._decided.set()

    def _verdict(self) -> Verdict | None:
        """Return the verdict; None while there is too little evidence."""
        limits = self._limits
        if self.new.batcher.health is not Health.HEALTHY:
            return Verdict.UNHEALTHY
        if self._errors > limits.max_error_ratio * max(1, self._requests):
            return Verdict.ERRORS
        if self._disagreeing > limits.max_disagreement * self._images:
            return Verdict.DISAGREEMENT
        ratios = self._slowdowns()
        slowdown = statistics.median(ratios) if ratios else 0.0
        enough = len(ratios) >= _RUNS_NEEDED
        if slowdown > limits.max_slowdown * (1.0 if enough else _OBVIOUS):
            return Verdict.LATENCY
        # A hang of the device says nothing about the version, nor does a trial without requests.
        sound = self.old.batcher.health is Health.HEALTHY
        if self._requests < limits.requests or not enough or not sound:
            return None
        return Verdict.GOOD

    def _slowdowns(self) -> list[float]:
        """Compare each run with the old version's runs of the same or the next larger batch size.

        A larger batch takes no less time, so a run that appears too slow is too slow.
        """
        medians = {
            size: statistics.median(runs)
            for size, runs in sorted(self._old_runs_s.items())
            if len(runs) >= _RUNS_NEEDED
        }
        ratios = []
        for size, took_s in self._new_runs:
            reference_s = next((m for known, m in medians.items() if known >= size), None)
            if reference_s:
                ratios.append(took_s / reference_s)
        return ratios


def _classes(model: LoadedModel, outputs: Outputs) -> NDArray[np.str_]:  # [N]
    # By name: a new version may have its classes in another order.
    names: NDArray[np.str_] = np.array(model.manifest.labels)[outputs.logits.argmax(axis=1)]
    return names


class Canaries:
    """The running trials, at most one per model.

    Args:
        limits: The limits of every trial; None for no trials.
        on_verdict: Called with each trial that has ended, and its verdict.
    """

    def __init__(
        self,
        limits: CanaryLimits | None,
        on_verdict: Callable[[CanaryTrial, Verdict], Awaitable[None]],
    ) -> None:
        self._limits = limits
        self._on_verdict = on_verdict
        self._trials: dict[str, tuple[CanaryTrial, asyncio.Task[None]]] = {}
        self._deciding: set[asyncio.Task[None]] = set()

    @property
    def enabled(self) -> bool:
        """Whether new versions need a trial."""
        return self._limits is not None

    def start(self, old: LoadedModel, new: LoadedModel) -> bool:
        """Start or continue the trial of a newer version; return False if it needs none.

        A return to an older version is a rollback by an operator and must not wait. A version with
        another input shape cannot run the old version's requests. An old version that fails every
        run gives no answers to compare with, and a version that passed its checks is better.
        """
        if old.batcher.health is Health.FAILING and new.batcher.health is Health.HEALTHY:
            self.end(new.name)
            return False
        trial, _ = self._trials.get(new.name, (None, None))
        if trial and trial.old is old and trial.new is new:
            return True
        self.end(new.name)
        same_input = old.manifest.sample_shape == new.manifest.sample_shape
        if self._limits is None or new.version < old.version or not same_input:
            return False
        logger.info("canary started", model=new.name, old=old.version, new=new.version)
        trial = CanaryTrial(old, new, self._limits)
        task = asyncio.create_task(self._run(trial))
        task.add_done_callback(self._deciding.discard)
        self._trials[new.name] = (trial, task)
        return True

    def end(self, model: str) -> None:
        """End the trial of a model without a verdict."""
        if known := self._trials.pop(model, None):
            known[1].cancel()

    def close(self) -> None:
        """End all trials."""
        for model in list(self._trials):
            self.end(model)
        for task in self._deciding:
            task.cancel()

    async def _run(self, trial: CanaryTrial) -> None:
        verdict = await trial.run()
        # From here on `end` must not cancel it.
        self._deciding.add(self._trials.pop(trial.new.name)[1])
        await self._on_verdict(trial, verdict)


class VerdictRecords:
    """Keeps a file NAME/VERSION.canary.json for each version that had a canary.

    The files are in a folder of the server's own, or else beside the versions in the repository,
    where every replica finds them. A record holds the digest of the version's manifest: a version
    that is published again under the same number is another. Call the methods on a thread.

    Args:
        folder: The folder of the server's own; None for the repository.
        key: Signs the records, and must have signed each valid one; None: records are unsigned.
    """

    def __init__(self, folder: Path | None = None, key: Ed25519PrivateKey | None = None) -> None:
        self._folder = folder
        self._key = key
        # The digests of manifests whose records are ignored, because some files cannot be removed.
        self._forgotten: set[str] = set()

    def find(self, version_folder: Path) -> Verdict | None:
        """Return the verdict on a version; None without a valid record."""
        model, version = version_folder.parent.name, int(version_folder.name)
        root = self._folder or repository_of(version_folder)
        try:
            content = read_small(record_path(root, version_folder), root)
            record = parse_record(content)
            digest = _digest(version_folder)
            if record.manifest_sha256 != digest or digest in self._forgotten:
                return None
            if self._key:
                verify_record(record, model, version, self._key.public_key())
            return Verdict(record.verdict)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RepositoryError) as error:
            logger.error(
                "canary record cannot be used", model=model, version=version, error=one_line(error)
            )
            return None

    def record(self, version_folder: Path, verdict: Verdict) -> None:
        """Record the verdict on a version; a record that cannot be written is logged."""
        model, version = version_folder.parent.name, int(version_folder.name)
        path = record_path(self._folder or repository_of(version_folder), version_folder)
        try:
            record = pb.CanaryRecord(
                schema_version=SCHEMA_VERSION,
                manifest_sha256=_digest(version_folder),
                verdict=verdict.value,
                decided_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            if self._key:
                sign_record(record, model, version, self._key)
            self._forgotten.discard(record.manifest_sha256)
            text = json_format.MessageToJson(record, preserving_proto_field_name=True)
            _replace(path, text)
        except (OSError, RepositoryError) as error:
            # For example a read-only repository: after a restart the version is tried again.
            logger.warning(
                "canary record cannot be written; --state-dir names a folder for it",
                model=model,
                version=version,
                error=one_line(error),
            )

    def forget(self, version_folder: Path) -> None:
        """Ignore the record of a version from now on, so that it is tried again."""
        with contextlib.suppress(RepositoryError):
            self._forgotten.add(_digest(version_folder))
        # A repository may be read-only.
        with contextlib.suppress(OSError):
            record_path(self._folder or repository_of(version_folder), version_folder).unlink()


def _replace(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not *.partial, which are the exporter's.
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def record_path(root: Path, version_folder: Path) -> Path:
    """Return the file of the record of a version, in a repository or another folder."""
    return root / version_folder.parent.name / f"{version_folder.name}.canary.json"


def _digest(version_folder: Path) -> str:
    return hashlib.sha256(read_manifest_bytes(version_folder)).hexdigest()
