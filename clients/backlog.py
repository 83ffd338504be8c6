"""What a stream of pictures still owes its caller, kept across broken connections."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from clients.connection import RetryPolicy
from clients.errors import (
    ClientError,
    DeadlineExceededError,
    OverloadedError,
    ServerError,
    UnavailableError,
    from_status,
)
from clients.results import Classification, classification
from convoy.v1 import classifier_pb2 as pb

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_WORTH_ANOTHER_TRY = (UnavailableError, OverloadedError)
_WON_BACK = 0.1
_MOST_DOUBLINGS = 30


@dataclass(slots=True)
class _Item:
    """A picture on its way.

    Attributes:
        due_s: When it shall be sent; None while an answer is awaited.
        trouble: Why it has not been answered yet, if the server said.
    """

    request: pb.ClassifyStreamRequest
    deadline_s: float
    due_s: float | None
    attempts: int = 0
    trouble: ServerError | None = None
    outcome: Classification | ClientError | None = None


class Backlog:
    """Pictures in their order, each until its outcome was taken.

    A refused picture is sent again after the server's pushback or a jittered backoff, within the
    retry policy; after a broken connection those without an answer are, and no others. Each has one
    deadline for all its attempts.

    Args:
        in_flight: The most that it holds.
        timeout_s: What a picture may take from when it was added.
        retry: How refusals are retried.
        clock: Monotonic seconds.
        draw: Draws evenly from 0 to 1.
    """

    def __init__(
        self,
        in_flight: int,
        timeout_s: float,
        retry: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._in_flight = in_flight
        self._timeout_s = timeout_s
        self._retry = retry
        self._clock = clock
        self._draw = draw
        self._items: dict[str, _Item] = {}
        self._added = 0
        self._breaks = 0
        self._tokens = float(retry.budget)

    @property
    def has_room(self) -> bool:
        """Whether another picture may be added."""
        return len(self._items) < self._in_flight

    @property
    def is_empty(self) -> bool:
        """Whether every outcome was taken."""
        return not self._items

    def add(self, request: pb.ClassifyRequest | ClientError) -> None:
        """Takes in a picture, or what was wrong with it."""
        now_s, name = self._clock(), str(self._added)
        self._added += 1
        if isinstance(request, ClientError):
            item = _Item(pb.ClassifyStreamRequest(), now_s, None, outcome=request)
        else:
            message = pb.ClassifyStreamRequest(id=name, request=request)
            item = _Item(message, now_s + self._timeout_s, now_s)
        self._items[name] = item

    def take(self) -> Classification | ClientError | None:
        """Returns the outcome of the first picture and forgets it; None while there is none."""
        for name, item in self._items.items():
            if item.outcome is not None:
                del self._items[name]
            return item.outcome
        return None

    def due(self) -> list[pb.ClassifyStreamRequest]:
        """Returns what shall be sent by now; it is taken to be sent."""
        now_s = self._clock()
        items = [item for item in self._open() if item.due_s is not None and item.due_s <= now_s]
        for item in items:
            item.due_s = None
            item.attempts += 1
        return [item.request for item in items]

    def wait_s(self) -> float:
        """Returns how long nothing is to be done unless an answer comes."""
        times_s = [
            item.deadline_s if item.due_s is None else min(item.due_s, item.deadline_s)
            for item in self._open()
        ]
        return max(0.0, min(times_s, default=0.0) - self._clock())

    def answered(self, reply: pb.ClassifyStreamResponse) -> None:
        """A reply came; one that nobody waits for any more is dropped."""
        self._breaks = 0
        item = self._items.get(reply.id)
        if item is None or item.outcome is not None:
            return
        if reply.WhichOneof("result") == "response":
            self._tokens = min(self._retry.budget, self._tokens + _WON_BACK)
            item.outcome = classification(reply.response)
            return
        code = _CODES.get(reply.error.code, grpc.StatusCode.UNKNOWN)
        error = from_status(code, reply.error.message)
        self._tokens = max(0.0, self._tokens - 1)
        spent = item.attempts >= self._retry.attempts or self._tokens <= self._retry.budget / 2
        if spent or not isinstance(error, _WORTH_ANOTHER_TRY):
            item.outcome = error
            return
        pushback_s = reply.error.retry_after_ms / 1000
        item.trouble = error
        item.due_s = self._clock() + (pushback_s or self._backoff_s(item.attempts))

    def broke(self, error: ServerError) -> None:
        """The connection is gone; what was not answered is due again after a while.

        Raises:
            ServerError: It is not worth another try.
        """
        if not isinstance(error, _WORTH_ANOTHER_TRY):
            raise error
        self._breaks += 1
        due_s = self._clock() + self._backoff_s(self._breaks)
        for item in self._open():
            item.trouble = error
            if item.due_s is None:
                item.due_s = due_s
                item.attempts -= 1  # the picture was not refused

    def expire(self) -> None:
        """Gives up on what is past its deadline."""
        now_s = self._clock()
        for item in self._open():
            if item.deadline_s <= now_s:
                late = DeadlineExceededError(f"no answer within {self._timeout_s:g} s")
                item.outcome = late if item.trouble is None else item.trouble

    def _open(self) -> list[_Item]:
        return [item for item in self._items.values() if item.outcome is None]

    def _backoff_s(self, attempts: int) -> float:
        """Draws a wait ("full jitter") below a bound that doubles with each attempt."""
        doublings = min(max(0, attempts - 1), _MOST_DOUBLINGS)
        bound_s = self._retry.initial_backoff_s * 2.0**doublings
        return self._draw() * min(bound_s, self._retry.max_backoff_s)
