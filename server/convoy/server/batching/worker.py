"""A worker: it takes batches when it is idle and runs them on its device, on its own thread."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from convoy.server.batching.batch import Batch, RequestSlice
from convoy.server.errors import DeviceMemoryError
from convoy.server.requests import Images, Outputs

T = TypeVar("T")
Run = Callable[[Images], Outputs]
Allocate = Callable[[tuple[int, ...]], Images]


def _allocate(shape: tuple[int, ...]) -> Images:
    return np.empty(shape, np.uint8)


@dataclass(frozen=True, slots=True)
class Runner:
    """A model on a device, as its workers see it.

    Attributes:
        run: Runs a batch `[N, H, W, 3]`; several workers may call it at once. It returns arrays
            that it does not write to again.
        allocate: Allocates a worker's batch buffer of a shape.
    """

    run: Run
    allocate: Allocate = _allocate


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outputs of slices of a batch, or the error of running them.

    A batch has one such result, unless the model failed and parts of it were run again.
    """

    slices: tuple[RequestSlice, ...]
    result: Outputs | Exception


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The results of a batch.

    Attributes:
        runs: In the order of the batch's slices.
        padded_images: Rows that were run beyond the batch's own.
        largest_run: The largest size to run from now on; None while the memory sufficed.
    """

    runs: tuple[RunResult, ...]
    padded_images: int
    largest_run: int | None


class InstanceThread:
    """The thread of a model instance: the model is warmed up, checked and run by no other.

    What a runtime prepares for the thread that runs a model, such as CUDA graphs, lasts only there.
    A daemon, so that a run that hangs does not keep the process from ending.

    Args:
        number: Part of the thread's name.
    """

    def __init__(self, number: int) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(
            target=_do_all, args=(self._todo,), name=f"model-instance-{number}", daemon=True
        ).start()
        # A model that never serves leaves no thread behind.
        weakref.finalize(self, self._todo.put, None)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function on this thread, after those before it."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._todo.put(work)
        return future

    def finish_with(self, function: Callable[[], None]) -> None:
        """Call a last function on this thread, which ends with it."""
        self._todo.put(function)
        self._todo.put(None)


def _do_all(todo: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (work := todo.get()) is not None:
        work()
        del work


class Worker:
    """Runs batches until it gets none.

    Args:
        number: Part of its thread's name.
        device: The number of its device.
        runner: The model on that device.
        buffer_shape: `[B, H, W, 3]` of the worker's own buffer, which every batch is copied to: the
            only copy of pixels between the wire and the device.
        padded: Returns the size that a batch of some size is run with.
        thread: The thread that warmed the model up; by default a new one.

    Attributes:
        device: The number of its device.
        started_at_s: When the current run began; None between runs.
        idle_at_s: When the current run is expected to end.
        batch: The current batch.
    """

    def __init__(
        self,
        number: int,
        device: int,
        runner: Runner,
        buffer_shape: tuple[int, ...],
        padded: Callable[[int], int],
        *,
        thread: InstanceThread | None = None,
    ) -> None:
        self.device = device
        self._number = number
        self._thread = thread
        self._run = runner.run
        self._buffer = runner.allocate(buffer_shape)
        self._padded = padded
        self.started_at_s: float | None = None
        self.idle_at_s = float("-inf")
        self.batch: Batch | None = None

    def start(self, serve: Callable[["Worker"], None]) -> None:
        """Let the thread call serve(self) and end."""
        thread, self._thread = self._thread or InstanceThread(self._number), None
        thread.finish_with(partial(serve, self))

    @property
    def is_idle(self) -> bool:
        """Whether it runs nothing."""
        return self.started_at_s is None

    def hangs(self, since_s: float) -> bool:
        """Return whether its current run began before a point in time."""
        started_at_s = self.started_at_s
        return started_at_s is not None and started_at_s < since_s

    def begin(self, batch: Batch) -> None:
        """Note the batch that it runs next."""
        self.batch = batch
        self.started_at_s = batch.sealed_at_s
        self.idle_at_s = batch.sealed_at_s + batch.predicted_s

    def begin_probe(self, now_s: float) -> None:
        """Note that it probes its device next."""
        self.started_at_s = self.idle_at_s = now_s

    def end(self, now_s: float) -> None:
        """Note that it is idle."""
        self.started_at_s = self.batch = None
        self.idle_at_s = now_s

    def probe(self) -> str:
        """Run one black image, as the warm-up did; return the error, empty for success."""
        images = self._buffer[: self._padded(1)]
        images.fill(0)
        try:
            self._run(images)
        except Exception as error:  # whatever the model raises
            return text_of(error)
        return ""

    def run(self, batch: Batch) -> BatchResult:
        """Run a batch; an error of the model becomes the result of the slices that it failed on."""
        runs: list[RunResult] = []
        largest: int | None = None
        todo = [batch.slices]
        while todo:
            slices = todo.pop()
            try:
                runs.append(RunResult(slices, self._run_together(slices)))
            except DeviceMemoryError as error:
                size = sum(each.size for each in slices)
                largest = max(1, size // 2)
                if size == 1:
                    runs.append(RunResult(slices, error))
                else:
                    todo.extend(reversed(_halve_images(slices, size)))
            except Exception as error:  # whatever the model raises
                if len(slices) == 1:
                    runs.append(RunResult(slices, error))
                else:
                    middle = len(slices) // 2
                    todo.extend((slices[middle:], slices[:middle]))
        padding = self._padded(batch.size) - batch.size if len(runs) == 1 else 0
        return BatchResult(tuple(runs), padding, largest)

    def _run_together(self, slices: tuple[RequestSlice, ...]) -> Outputs:
        end = 0
        for each in slices:
            start, end = end, end + each.stop - each.start
            self._buffer[start:end] = each.request.images[each.start : each.stop]
        padded = self._padded(end)
        outputs = self._run(self._buffer[:padded])
        return outputs if padded == end else outputs.rows(0, end)


def text_of(error: BaseException) -> str:
    """Return an error with its class in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _halve_images(
    slices: tuple[RequestSlice, ...], size: int
) -> tuple[tuple[RequestSlice, ...], tuple[RequestSlice, ...]]:
    """Split at the middle image, inside a request if necessary."""
    room = size // 2
    first: list[RequestSlice] = []
    second: list[RequestSlice] = []
    for each in slices:
        cut = each.start + min(each.size, max(room, 0))
        if cut > each.start:
            first.append(RequestSlice(each.request, each.start, cut))
        if cut < each.stop:
            second.append(RequestSlice(each.request, cut, each.stop))
        room -= each.size
    return tuple(first), tuple(second)
