"""A request between two processes: the front end's batcher, and a front end at its owner."""

import asyncio
import itertools
import math
import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from convoy.server.batching import BatchingLimits, Health
from convoy.server.errors import InferenceError, RequestError, StartupError, UnavailableError
from convoy.server.frontends.ipc import (
    Admitted,
    AllProcessed,
    Answered,
    Arena,
    AskStatistics,
    Cancel,
    Failed,
    Infer,
    InferFailed,
    Link,
    Listening,
    Released,
    Removed,
    Samples,
    StatisticsRead,
)
from convoy.server.logs import FailureLog
from convoy.server.metrics.batches import ModelStatistics
from convoy.server.models.registry import Lease, LoadedModel, ServedModel
from convoy.server.requests import Images, Outputs, Prediction


class RemoteRequests:
    """The requests of this process at its owner.

    Args:
        send: Sends a message to the owner.
        arena: Memory for the pixels.
    """

    def __init__(self, send: Callable[[object], None], arena: Arena) -> None:
        self._send = send
        self._arena = arena
        self._numbers = itertools.count()
        self._under_way: dict[int, tuple[asyncio.Future[Prediction], int]] = {}
        self._asked: dict[int, asyncio.Future[ModelStatistics]] = {}

    async def infer(
        self, model: int, images: Images, deadline_s: float, priority: int, client: str
    ) -> Prediction:
        """Run images at the owner; arguments as of `DynamicBatcher.infer`."""
        offset = self._arena.place(images)
        number = next(self._numbers)
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._under_way[number] = future, offset
        self._send(Infer(number, model, offset, images.shape, deadline_s, priority, client))
        try:
            return await future
        except asyncio.CancelledError:
            self._send(Cancel(number))
            raise
        finally:
            # It refers to an error that refers to this frame: a cycle for the garbage collector.
            del future

    def answered(self, message: Answered | InferFailed) -> None:
        """Release a request's pixels, as the owner has done."""
        future, offset = self._under_way.pop(message.number)
        self._arena.free(offset)
        if future.done():
            return
        if isinstance(message, InferFailed):
            future.set_exception(message.error)
            return
        outputs = Outputs(message.logits, message.probabilities)
        future.set_result(
            Prediction(outputs, message.queue_s, message.inference_s, message.batch_size)
        )

    async def statistics(self, model: int) -> ModelStatistics:
        """Ask the owner for the statistics of a version's batcher."""
        number = next(self._numbers)
        future: asyncio.Future[ModelStatistics] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self._send(AskStatistics(number, model))
        return await future

    def statistics_read(self, message: StatisticsRead) -> None:
        """Handle a message of the owner."""
        future = self._asked.pop(message.number)
        if not future.done():
            future.set_result(message.statistics)

    def lose(self) -> None:
        """Handle the loss of the owner: no request can be answered."""
        futures: list[asyncio.Future[Any]] = [future for future, _ in self._under_way.values()]
        for future in (*futures, *self._asked.values()):
            if not future.done():
                future.set_exception(UnavailableError("the server is shut down"))


@dataclass(slots=True)
class RemoteBatcher:
    """The front end's batcher of one version.

    Attributes:
        key: Names the version to the owner.
        limits: The limits of the real batcher.
        requests: Carries them to it.
        health: Whether the model works.
    """

    key: int
    limits: BatchingLimits
    requests: RemoteRequests
    health: Health

    async def infer(
        self,
        images: Images,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> Prediction:
        """Run images as `DynamicBatcher.infer` does.

        Raises:
            RequestError: As there; OverloadedError also if the memory is full.
        """
        return await self.requests.infer(self.key, images, deadline_s, priority, client)


@dataclass(frozen=True, slots=True, eq=False)
class RemoteModel(ServedModel):
    """A version in service in the process of its owner."""

    batcher: RemoteBatcher


class ServedFrontEnd:
    """Runs the requests of one front end.

    Args:
        process: Its process.
        memory: Where it puts their pixels.
        counted: Receives its counts.
        failures: Logs unexpected errors.

    Attributes:
        link: The connection to it.
        listening: Done when it accepts calls; a StartupError if it cannot.
        ended: Set when it is gone.
        process: Its process.
        reason: Why it could not start; empty if unknown.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        memory: mmap.mmap,
        counted: Callable[[Samples], None],
        failures: FailureLog,
    ) -> None:
        self.process = process
        self.reason = ""
        self._reported = False
        self._memory = memory
        self._counted = counted
        self._failures = failures
        self._models: dict[int, LoadedModel] = {}
        self._leases: dict[int, Lease] = {}
        self._runs: dict[int, asyncio.Task[Prediction]] = {}
        self._readings: set[asyncio.Task[ModelStatistics]] = set()
        self._loop = asyncio.get_running_loop()
        self._asked: deque[asyncio.Future[None]] = deque()
        self.link = Link(self._receive, self._lost)
        self.listening: asyncio.Future[None] = self._loop.create_future()
        # Nobody waits for a restarted one.
        self.listening.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.ended = asyncio.Event()

    @property
    def takes_calls(self) -> bool:
        """Whether it has begun to accept calls."""
        return self.listening.done() and self.listening.exception() is None

    def has_reported(self) -> bool:
        """Return whether it sent a report since the last call."""
        reported, self._reported = self._reported, False
        return reported

    def admit(self, key: int, model: LoadedModel) -> None:
        """Let it send requests for a version; the version stays loaded until it releases it."""
        self._models[key] = model
        self._leases[key] = model.lease()
        batcher = model.batcher
        self.link.send(
            Admitted(
                key,
                model.manifest,
                model.runtime,
                model.runs_on,
                batcher.limits,
                batcher.health,
                model.examples,
            )
        )

    def remove(self, key: int) -> None:
        """Ask it to release a version."""
        self.link.send(Removed(key))

    async def all_processed(self) -> None:
        """Wait until it has processed the last message, or has ended."""
        heard: asyncio.Future[None] = self._loop.create_future()
        self._asked.append(heard)
        self.link.send(AllProcessed())
        await heard

    def _receive(self, message: Any) -> None:
        match message:
            case Infer():
                self._infer(message)
            case Cancel(number):
                if run := self._runs.get(number):
                    run.cancel()
            case AskStatistics():
                self._read_statistics(message)
            case Samples():
                self._reported = True
                self._counted(message)
            case Released(key):
                del self._models[key]
                self._leases.pop(key).release()
            case AllProcessed():
                _done(self._asked.popleft())
            case Listening():
                self._reported = True
                _done(self.listening)
            case Failed(reason):
                self.reason = reason
                self._fail(reason)

    def _infer(self, ask: Infer) -> None:
        pixels = np.frombuffer(self._memory, np.uint8, math.prod(ask.shape), ask.offset)
        run = self._loop.create_task(
            self._models[ask.model].batcher.infer(
                pixels.reshape(ask.shape), ask.deadline_s, ask.priority, ask.client
            )
        )
        self._runs[ask.number] = run
        # Not in a wrapping coroutine, which would never start if it is cancelled early.
        run.add_done_callback(partial(self._answer, ask.number))

    def _read_statistics(self, ask: AskStatistics) -> None:
        reading = self._loop.create_task(self._models[ask.model].statistics())
        self._readings.add(reading)
        reading.add_done_callback(self._readings.discard)
        reading.add_done_callback(
            lambda done: self.link.send(StatisticsRead(ask.number, done.result()))
        )

    def _answer(self, number: int, run: asyncio.Task[Prediction]) -> None:
        del self._runs[number]
        self.link.send(self._reply(number, run))

    def _reply(self, number: int, run: asyncio.Task[Prediction]) -> Answered | InferFailed:
        if run.cancelled():
            return InferFailed(number, UnavailableError("the caller disconnected"))
        error = run.exception()
        if error is None:
            done = run.result()
            outputs = done.outputs
            return Answered(
                number,
                outputs.logits,
                outputs.probabilities,
                done.queue_s,
                done.inference_s,
                done.batch_size,
            )
        if isinstance(error, RequestError) and not isinstance(error, InferenceError):
            return InferFailed(number, error)
        # The log gets its cause, the front end the id.
        error_id = self._failures.record("request failed", error)
        return InferFailed(number, InferenceError("the model failed on this request", error_id))

    def _lost(self) -> None:
        for run in self._runs.values():
            run.cancel()
        for lease in self._leases.values():
            lease.release()
        self._leases.clear()
        self._models.clear()
        for heard in self._asked:
            _done(heard)
        self._fail("--front-ends: a front end ended while it started")
        self.ended.set()

    def _fail(self, reason: str) -> None:
        if not self.listening.done():
            self.listening.set_exception(StartupError(reason))


def _done(waited_for: asyncio.Future[None]) -> None:
    if not waited_for.done():
        waited_for.set_result(None)
