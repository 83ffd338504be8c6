"""A front end, as its owner sees it."""

import asyncio
import math
import mmap
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import structlog

from server.errors import InferenceError, RequestError, StartupError, UnavailableError
from server.frontends.link import Link
from server.frontends.messages import (
    Admitted,
    AllHeard,
    Answered,
    AskStatistics,
    Cancel,
    Failed,
    Infer,
    Listening,
    Refused,
    Released,
    Removed,
    SampleKey,
    Samples,
    StatisticsRead,
)
from server.requests import Prediction
from server.served_model import LoadedModel
from server.statistics import ModelStatistics

logger = structlog.get_logger()


class ServedFrontEnd:
    """Runs the requests of one front end.

    Args:
        memory: Where it puts their pixels.
        counted: Takes what it counted so far.

    Attributes:
        link: Leads to it.
        listening: Done when it takes calls; a StartupError where it cannot.
        ended: Set when it is gone.
    """

    def __init__(
        self, memory: mmap.mmap, counted: Callable[[dict[SampleKey, float]], None]
    ) -> None:
        self._memory = memory
        self._counted = counted
        self._models: dict[int, LoadedModel] = {}
        self._runs: dict[int, asyncio.Task[Prediction]] = {}
        self._readings: set[asyncio.Task[ModelStatistics]] = set()
        self._loop = asyncio.get_running_loop()
        self._asked: deque[asyncio.Future[None]] = deque()
        self.link = Link(self._receive, self._lost)
        self.listening: asyncio.Future[None] = self._loop.create_future()
        # Nobody waits for one that was started again.
        self.listening.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.ended = asyncio.Event()

    def admit(self, key: int, model: LoadedModel) -> None:
        """Lets it send requests for a version, which it holds until it has let go of it."""
        model.users.__enter__()
        self._models[key] = model
        self.link.send(
            Admitted(key, model.manifest, model.runtime, model.runs_on, model.batcher.limits)
        )

    def remove(self, key: int) -> None:
        """Wants it to let go of a version."""
        self.link.send(Removed(key))

    async def all_heard(self) -> None:
        """Waits until it has done what it was told, or is gone."""
        heard: asyncio.Future[None] = self._loop.create_future()
        self._asked.append(heard)
        self.link.send(AllHeard())
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
            case Samples(values):
                self._counted(values)
            case Released(key):
                self._models.pop(key).users.__exit__()
            case AllHeard():
                _done(self._asked.popleft())
            case Listening():
                _done(self.listening)
            case Failed(reason):
                self._fail(reason)

    def _infer(self, ask: Infer) -> None:
        pixels = np.frombuffer(self._memory, np.uint8, math.prod(ask.shape), ask.offset)
        run = self._loop.create_task(
            self._models[ask.model].batcher.infer(
                pixels.reshape(ask.shape), ask.deadline_s, ask.priority, ask.client
            )
        )
        self._runs[ask.number] = run
        # Not in a coroutine around it, which would never start when it is cancelled early.
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
        self.link.send(_reply(number, run))

    def _lost(self) -> None:
        for run in self._runs.values():
            run.cancel()
        for model in self._models.values():
            model.users.__exit__()
        self._models.clear()
        for heard in self._asked:
            _done(heard)
        self._fail("--front-ends: one ended as it started")
        self.ended.set()

    def _fail(self, reason: str) -> None:
        if not self.listening.done():
            self.listening.set_exception(StartupError(reason))


def _reply(number: int, run: asyncio.Task[Prediction]) -> Answered | Refused:
    if run.cancelled():
        return Refused(number, UnavailableError("the caller left"))
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
    if isinstance(error, InferenceError) or not isinstance(error, RequestError):
        # Its cause does not travel.
        logger.error("inference failed", exc_info=error)
        return Refused(number, InferenceError("the model failed on this request"))
    return Refused(number, error)


def _done(waited_for: asyncio.Future[None]) -> None:
    if not waited_for.done():
        waited_for.set_result(None)
