"""A backend that waits at a gate the test opens, a clock the test sets: no sleep decides."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np

from convoy.server.batching import BatchReport, DynamicBatcher, Health
from convoy.server.errors import DeviceMemoryError
from convoy.server.requests import Images, Outcome, Outputs

SHAPE = (2, 2, 3)
Make = Callable[..., DynamicBatcher]


class GatedBackend:
    """Answers each image with its first pixel's value; every run waits for a permit."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.error: Exception | None = None
        # Images of this value make the model raise.
        self.poison: dict[int, Exception] = {}
        self.memory_images = 1_000_000
        # Called by each run, as if it took time.
        self.on_run: Callable[[], None] = lambda: None
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)

    def run(self, images: Images) -> Outputs:
        with self._lock:
            self.batches.append(images[:, 0, 0, 0].tolist())
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        self.entered.release()
        self.permits.acquire()
        self.on_run()
        with self._lock:
            self.running -= 1
            self._idle.notify_all()
        if self.error:
            raise self.error
        for value, error in self.poison.items():
            if value in images[:, 0, 0, 0]:
                raise error
        if len(images) > self.memory_images:
            raise DeviceMemoryError(f"no memory for {len(images)} images")
        values = images[:, 0, 0, :1].astype(np.float32)
        return Outputs(values, values / 255)

    def wait_until_idle(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self.running)

    async def wait_for_run(self) -> None:
        await asyncio.to_thread(self.entered.acquire)


class Observer:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.reports: list[BatchReport] = []
        self.rejections: list[Outcome] = []
        self.health: list[Health] = []
        self.ill = asyncio.Event()
        self.recovered = asyncio.Event()
        self.failures = 0
        self.did_not_fit = 0
        self.batch_sizes: list[int] = []
        self.failed_requests = 0
        self.corrections: list[tuple[int, int]] = []

    def batch_finished(self, report: BatchReport) -> None:
        assert report.inference_s >= 0
        assert len(report.outputs.logits) == report.size
        self.sizes.append(report.size)
        self.reports.append(report)

    def batch_failed(self, error: Exception, requests: int) -> None:
        self.failures += 1
        self.failed_requests += requests

    def batch_did_not_fit(self) -> None:
        self.did_not_fit += 1

    def request_rejected(self, outcome: Outcome) -> None:
        self.rejections.append(outcome)

    def sizes_corrected(self, preferred: int, largest: int) -> None:
        self.corrections.append((preferred, largest))

    def health_changed(self, health: Health) -> None:
        self.health.append(health)
        (self.recovered if health is Health.HEALTHY else self.ill).set()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def image(value: int, count: int = 1) -> Images:
    return np.full((count, *SHAPE), value, np.uint8)


async def queue(batcher: DynamicBatcher, *requests: Awaitable[object]) -> list[asyncio.Future]:
    """Starts requests and lets each of them reach the queue, in this order."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    await asyncio.sleep(0)
    return tasks
