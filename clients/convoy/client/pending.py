"""The images of a stream without an answer, kept across broken connections."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from convoy.client.connection import RetryPolicy
from convoy.client.errors import (
    STATUS_CODES,
    ClientError,
    DeadlineExceededError,
    OverloadedError,
    ServerError,
    UnavailableError,
    from_status,
)
from convoy.client.results import Classification, classification
from convoy.v1 import classifier_pb2 as pb

_RETRYABLE = (UnavailableError, OverloadedError)
_TOKENS_A_SUCCESS = 0.1
_MAX_DOUBLINGS = 30


@dataclass(slots=True)
class _Item:
    """An image that was added.

    Attributes:
        due_s: When to send it; None while it waits for an answer.
        last_error: Why it has no answer yet, if the server said.
    """

    request: pb.ClassifyStreamRequest
    deadline_s: float
    due_s: float | None
    attempts: int = 0
    last_error: ServerError | None = None
    outcome: Classification | ClientError | None = None


class PendingRequests:
    """A bounded, ordered window of images; each stays until its outcome is taken.

    An image that the server rejects as overloaded or unavailable is sent again after the server's
    pushback or a jittered backoff, within the retry policy. After a broken connection, only images
    without an answer are sent again. An image has one deadline for all its attempts.

    Args:
        in_flight: The most images.
        timeout_s: The deadline of an image, from when it was added; None for none.
        retry: The retry policy.
        clock: Monotonic seconds.
        draw: Draws evenly from 0 to 1.
    """

    def __init__(
        self,
        in_flight: int,
        timeout_s: float | None,
        retry: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._in_flight = in_flight
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._retry = retry
        self._clock = clock
        self._draw = draw
        self._items: dict[str, _Item] = {}
        self._added = 0
        self._breaks = 0
        self._reconnect_s = -math.inf
        self._tokens = float(retry.budget)

    @property
    def has_room(self) -> bool:
        """Whether another image may be added."""
        return len(self._items) < self._in_flight

    @property
    def is_empty(self) -> bool:
        """Whether every outcome was taken."""
        return not self._items

    def add(self, request: pb.ClassifyRequest | ClientError) -> None:
        """Add an image, or the error of one that cannot be sent."""
        now_s, name = self._clock(), str(self._added)
        self._added += 1
        if isinstance(request, ClientError):
            item = _Item(pb.ClassifyStreamRequest(), now_s, None, outcome=request)
        else:
            message = pb.ClassifyStreamRequest(id=name, request=request)
            item = _Item(message, now_s + self._timeout_s, max(now_s, self._reconnect_s))
        self._items[name] = item

    def take(self) -> Classification | ClientError | None:
        """Remove the first image and return its outcome; None while it has none."""
        for name, item in self._items.items():
            if item.outcome is not None:
                del self._items[name]
            return item.outcome
        return None

    def due(self) -> list[pb.ClassifyStreamRequest]:
        """Return the images to send now, and count them as sent."""
        now_s = self._clock()
        items = [item for item in self._open() if item.due_s is not None and item.due_s <= now_s]
        for item in items:
            item.due_s = None
            item.attempts += 1
        return [item.request for item in items]

    def wait_s(self) -> float | None:
        """Return the time until an outcome can be taken, an image sent, or one expires.

        Returns:
            None if that needs a reply or another image.
        """
        first = next(iter(self._items.values()), None)
        if first is not None and first.outcome is not None:
            return 0.0
        times_s = [
            item.deadline_s if item.due_s is None else min(item.due_s, item.deadline_s)
            for item in self._open()
        ]
        next_s = min(times_s, default=math.inf)
        return None if math.isinf(next_s) else max(0.0, next_s - self._clock())

    def answered(self, reply: pb.ClassifyStreamResponse) -> None:
        """Record a reply; ignore one for an image that no longer waits."""
        self._breaks = 0
        item = self._items.get(reply.id)
        if item is None or item.outcome is not None:
            return
        if reply.WhichOneof("result") == "response":
            self._tokens = min(self._retry.budget, self._tokens + _TOKENS_A_SUCCESS)
            item.outcome = classification(reply.response)
            return
        code = STATUS_CODES.get(reply.error.code, grpc.StatusCode.UNKNOWN)
        error = from_status(code, reply.error.message)
        self._tokens = max(0.0, self._tokens - 1)
        spent = item.attempts >= self._retry.attempts or self._tokens <= self._retry.budget / 2
        if spent or not isinstance(error, _RETRYABLE):
            item.outcome = error
            return
        pushback_s = reply.error.retry_after_ms / 1000
        item.last_error = error
        item.due_s = self._clock() + (pushback_s or self._backoff_s(item.attempts))

    def broke(self, error: ServerError) -> None:
        """Record that the connection broke: nothing is sent before a backoff has passed.

        Raises:
            ServerError: The error is not retryable.
        """
        if not isinstance(error, _RETRYABLE):
            raise error
        self._breaks += 1
        self._reconnect_s = self._clock() + self._backoff_s(self._breaks)
        for item in self._open():
            item.last_error = error
            if item.due_s is None:
                item.attempts -= 1  # the server did not reject the image
            item.due_s = max(item.due_s or 0.0, self._reconnect_s)

    def expire(self) -> None:
        """Give an error to every image that is past its deadline."""
        now_s = self._clock()
        for item in self._open():
            if item.deadline_s <= now_s:
                late = DeadlineExceededError(
                    f"no answer within {self._timeout_s:g} s", grpc.StatusCode.DEADLINE_EXCEEDED
                )
                item.outcome = late if item.last_error is None else item.last_error

    def _open(self) -> list[_Item]:
        return [item for item in self._items.values() if item.outcome is None]

    def _backoff_s(self, attempts: int) -> float:
        """Draw a wait ("full jitter") below a bound that doubles with each attempt."""
        doublings = min(max(0, attempts - 1), _MAX_DOUBLINGS)
        bound_s = self._retry.initial_backoff_s * 2.0**doublings
        return self._draw() * min(bound_s, self._retry.max_backoff_s)
