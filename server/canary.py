"""Tries a new version on live requests before it answers any of them.

While a trial runs, the old version answers every caller. A share of the answered requests is run
by the new version too, unseen, and compared: does it fail, is it slower, does it name another
class? So a bad version costs time on the device, and never a request.
"""

import asyncio
import statistics
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import structlog
from numpy.typing import NDArray

from server.errors import InferenceError, RequestError
from server.requests import Images, Outputs, Prediction
from server.served_model import LoadedModel

logger = structlog.get_logger()

# Requests that the new version may have under way; more are not tried, so it cannot pile up work.
_MAX_UNDER_WAY = 8
# Runs of a batch size that are kept, and those that make a median.
_RUNS_KEPT = 200
_RUNS_NEEDED = 5


class Verdict(Enum):
    """How a trial ended; the values are the label `reason` of convoy_rollbacks_total."""

    GOOD = "good"
    ERRORS = "errors"
    LATENCY = "latency"
    DISAGREEMENT = "disagreement"


@dataclass(frozen=True, slots=True)
class CanaryLimits:
    """What a new version must stand.

    Attributes:
        share: Of the requests, that it is tried on; above 0, up to 1.
        requests: How many make a verdict.
        timeout_s: After which the verdict is made of what there is; without traffic it is good.
        max_error_ratio: Share of them that may fail.
        max_slowdown: How many times as long as the old version's its runs may take.
        max_disagreement: Share of the images that it may put into another class.
    """

    share: float
    requests: int = 200
    timeout_s: float = 300.0
    max_error_ratio: float = 0.01
    max_slowdown: float = 1.5
    max_disagreement: float = 0.1


class CanaryTrial:
    """One trial of one version.

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
        self._under_way: set[asyncio.Task[None]] = set()
        self._decided = asyncio.Event()

    async def run(self) -> Verdict:
        """Watches the old version's requests until there is a verdict."""
        self.old.batcher.tap = self._saw
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._decided.wait()
        except TimeoutError:
            pass
        finally:
            self.old.batcher.tap = None
            for task in self._under_way:
                task.cancel()
        return self._verdict()

    def _saw(self, images: Images, prediction: Prediction) -> None:
        self._old_runs_s[prediction.batch_size].append(prediction.inference_s)
        self._credit = min(1.0, self._credit + self._limits.share)
        if self._credit >= 1.0 and len(self._under_way) < _MAX_UNDER_WAY:
            self._credit -= 1.0
            # A copy: the caller's buffer is free once it has its answer.
            task = asyncio.create_task(self._try(images.copy(), prediction.outputs))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _try(self, images: Images, expected: Outputs) -> None:
        try:
            answer = await self.new.batcher.infer(images)
        except InferenceError:
            self._errors += 1
        except RequestError:  # its queue is full, which says nothing about it
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

    def _verdict(self) -> Verdict:
        limits = self._limits
        if self._errors > limits.max_error_ratio * max(1, self._requests):
            return Verdict.ERRORS
        if self._disagreeing > limits.max_disagreement * self._images:
            return Verdict.DISAGREEMENT
        if self._slowdown() > limits.max_slowdown:
            return Verdict.LATENCY
        return Verdict.GOOD

    def _slowdown(self) -> float:
        """Compares each run with the old version's runs of the same batch size, or the next larger.

        A larger batch takes no less time, so that what is found too slow is so.
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
        return statistics.median(ratios) if len(ratios) >= _RUNS_NEEDED else 0.0


def _classes(model: LoadedModel, outputs: Outputs) -> NDArray[np.str_]:  # [N]
    # By name: a new version may have its classes in another order.
    names: NDArray[np.str_] = np.array(model.manifest.labels)[outputs.logits.argmax(axis=1)]
    return names


class Canaries:
    """The trials under way, at most one a model.

    Args:
        limits: What new versions must stand; None lets them take over at once.
        settle: Is given each trial that came to its end, with the verdict.
    """

    def __init__(
        self,
        limits: CanaryLimits | None,
        settle: Callable[[CanaryTrial, Verdict], Awaitable[None]],
    ) -> None:
        self._limits = limits
        self._settle = settle
        self._trials: dict[str, tuple[CanaryTrial, asyncio.Task[None]]] = {}
        self._settling: set[asyncio.Task[None]] = set()

    def tries(self, old: LoadedModel, new: LoadedModel) -> bool:
        """Begins, or goes on with, the trial of a newer version; False where it needs none.

        An older one is what an operator takes back, and that must not wait. A version that takes
        other images cannot be tried on the old one's.
        """
        trial, _ = self._trials.get(new.name, (None, None))
        if trial and trial.old is old and trial.new is new:
            return True
        self.end(new.name)
        same_input = old.manifest.sample_shape == new.manifest.sample_shape
        if self._limits is None or new.version < old.version or not same_input:
            return False
        logger.info("canary began", model=new.name, old=old.version, new=new.version)
        trial = CanaryTrial(old, new, self._limits)
        task = asyncio.create_task(self._run(trial))
        task.add_done_callback(self._settling.discard)
        self._trials[new.name] = (trial, task)
        return True

    def end(self, model: str) -> None:
        """Ends the trial of a model without a verdict."""
        if known := self._trials.pop(model, None):
            known[1].cancel()

    def close(self) -> None:
        """Ends all."""
        for model in list(self._trials):
            self.end(model)
        for task in self._settling:
            task.cancel()

    async def _run(self, trial: CanaryTrial) -> None:
        verdict = await trial.run()
        # From here on it is no trial that could be ended.
        self._settling.add(self._trials.pop(trial.new.name)[1])
        await self._settle(trial, verdict)
