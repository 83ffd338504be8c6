"""Any interleaving of what callers, the clock, the device and an operator do to batchers.

Whatever Hypothesis makes of it, every accepted request is answered exactly once, with its own rows,
and no image is run twice with success. Devices fail, are probed and recover meanwhile. Each image
carries a number of its own in its pixels, which the fake device returns as its logits. Threads run
freely between the steps: nothing asserted here depends on how fast they are.
"""

import asyncio
import threading
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from convoy.server.batching import BatchingLimits, DynamicBatcher, Health, LatencyModel, Runner
from convoy.server.errors import (
    DeadlineExceededError,
    DeviceMemoryError,
    InferenceError,
    OverloadedError,
    UnavailableError,
)
from convoy.server.requests import Images, Outputs, Prediction
from tests.server.batching.fakes import Clock, Observer

SHAPE = (1, 1, 3)
MAX_BATCH = 4
LIMITS = BatchingLimits(
    MAX_BATCH,
    max_queue_size=28,
    instances=3,
    max_client_share=0.5,
    hang_timeout_s=1e9,
    preferred_batch_size=2,
)
FINISH_S = 30


@dataclass
class Run:
    """A run that waits on the device."""

    numbers: list[int]
    finished: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class Devices:
    """Hold every run until the test lets it end, or fail; count what became of each image."""

    def __init__(self) -> None:
        self.waiting: list[Run] = []
        self.served: list[int] = []
        self.failed: set[int] = set()
        self.seen: set[int] = set()
        self._lock = threading.Lock()

    def run(self, device: int, images: Images) -> Outputs:
        assert 0 < len(images) <= MAX_BATCH
        pixels = images.reshape(-1, 3).astype(np.int64)
        numbers = (pixels[:, 0] * 65536 + pixels[:, 1] * 256 + pixels[:, 2]).tolist()
        # Batchers probe devices with black images.
        numbers = [number for number in numbers if number]
        run = Run(numbers)
        with self._lock:
            self.seen.update(numbers)
            self.waiting.append(run)
        run.finished.wait()
        with self._lock:
            if run.error:
                self.failed.update(numbers)
                raise run.error
            self.served += numbers
        scores = np.array(numbers or [0], np.float32)[:, None]
        return Outputs(scores, np.full_like(scores, device))

    def end_one(self, which: int = 0, error: Exception | None = None) -> None:
        """Ends one of the runs that wait, if one does; 0 is the one that waits longest."""
        with self._lock:
            run = self.waiting.pop(which % len(self.waiting)) if self.waiting else None
        if run:
            run.error = error
            run.finished.set()


@dataclass
class Asked:
    """A request as its caller knows it."""

    numbers: list[int]
    task: asyncio.Task[Prediction]
    has_deadline: bool
    stopped: bool
    cancelled: bool = False


class Batchers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.problems: list[dict[str, object]] = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self.clock = Clock()
        self.devices = Devices()
        self.asked: list[Asked] = []
        self.drains: list[asyncio.Task[None]] = []
        self.numbers = 1
        self.stopped = True
        self.health: list[Health] = []

    @initialize()
    def first(self) -> None:
        self.swap()

    def turn(self) -> None:
        """Lets the event loop do what is due."""
        self.loop.run_until_complete(asyncio.sleep(0))

    @rule(
        count=st.integers(1, 9),
        budget_s=st.one_of(st.none(), st.floats(0.5, 8)),
        priority=st.integers(0, 4),
        client=st.sampled_from(["", "a", "b"]),
    )
    def ask(self, count: int, budget_s: float | None, priority: int, client: str) -> None:
        numbers = list(range(self.numbers, self.numbers + count))
        self.numbers += count
        pixels = [[number >> 16, number >> 8 & 255, number & 255] for number in numbers]
        images = np.array(pixels, np.uint8).reshape(count, *SHAPE)
        deadline_s = float("inf") if budget_s is None else self.clock.now_s + budget_s
        call = self.batcher.infer(images, deadline_s, priority, client)
        task = self.loop.create_task(call)
        self.asked.append(Asked(numbers, task, budget_s is not None, self.stopped))
        self.turn()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        asked.cancelled |= asked.task.cancel()
        self.turn()

    @rule(passed_s=st.floats(0.1, 3))
    def time_passes(self, passed_s: float) -> None:
        self.clock.now_s += passed_s

    @rule(which=st.integers(0, 2))
    def a_run_ends(self, which: int) -> None:
        self.devices.end_one(which)
        self.turn()

    @rule(which=st.integers(0, 2), memory=st.booleans())
    def a_run_fails(self, which: int, memory: bool) -> None:
        error = DeviceMemoryError("full") if memory else ZeroDivisionError("model")
        self.devices.end_one(which, error)
        self.turn()

    @rule()
    def swap(self) -> None:
        """A new version takes over; the old one answers what it accepted."""
        if not self.stopped:
            self.stop()
        # Two instances on the one device, one on the other, which is slower.
        latency = LatencyModel({1: 0.4, 4: 0.7}, {1: 0.6, 4: 0.8})
        runners = [Runner(partial(self.devices.run, device)) for device in range(2)]
        self.batcher = DynamicBatcher(
            runners, SHAPE, LIMITS, Observer(), self.clock, latency=latency
        )

        async def start() -> None:
            self.batcher.start(self.health.append)

        self.loop.run_until_complete(start())
        self.stopped = False

    @precondition(lambda self: not self.stopped)
    @rule()
    def stop(self) -> None:
        self.drains.append(self.loop.create_task(self.batcher.drain()))
        self.stopped = True
        self.turn()

    @invariant()
    def nothing_went_wrong_unseen(self) -> None:
        assert not self.problems

    def teardown(self) -> None:
        if not self.stopped:
            self.stop()
        self.loop.run_until_complete(asyncio.wait_for(self._finish(), FINISH_S))
        for asked in self.asked:
            self._check(asked)
        assert len(self.devices.served) == len(set(self.devices.served))
        assert not self.problems
        self.loop.close()

    async def _finish(self) -> None:
        pending = {*self.drains, *(asked.task for asked in self.asked)}
        while pending:
            self.devices.end_one()
            _, pending = await asyncio.wait(pending, timeout=0.001)

    def _check(self, asked: Asked) -> None:
        if asked.task.cancelled():
            assert asked.cancelled
            return
        match asked.task.exception():
            case None:
                assert asked.task.result().outputs.logits[:, 0].tolist() == asked.numbers
                assert set(asked.numbers) <= set(self.devices.served)
            case DeadlineExceededError():
                assert asked.has_deadline
            case InferenceError():
                assert self.devices.failed & set(asked.numbers)
            case OverloadedError():
                assert not self.devices.seen & set(asked.numbers)
            case UnavailableError():
                assert asked.stopped or Health.FAILING in self.health
            case error:
                raise AssertionError(error)


TestBatchers = Batchers.TestCase
TestBatchers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
