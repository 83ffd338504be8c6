"""Notices a run that hangs on the device."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from server.batcher.instance import ModelInstance

logger = structlog.get_logger()

# It looks this many times in the time that a run may take.
_LOOKS = 4


class Watchdog:
    """Looks every now and then for a run that takes too long; belongs to the event loop.

    Args:
        instances: Whose runs.
        timeout_s: A run that takes longer is taken for dead.
        clock: Monotonic seconds.
        abandon: Is given the instances that hang, at every look.

    Attributes:
        healthy: False while a run hangs.
    """

    def __init__(
        self,
        instances: Sequence[ModelInstance],
        timeout_s: float,
        clock: Callable[[], float],
        abandon: Callable[[list[ModelInstance]], None],
    ) -> None:
        self.healthy = True
        self._instances = instances
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_health: Callable[[bool], None]
        self._abandon = abandon
        self._next: asyncio.TimerHandle | None = None

    def start(self, on_health: Callable[[bool], None]) -> None:
        """Looks from now on, on the running loop.

        Args:
            on_health: Is told when a run hangs, and when it came back after all.
        """
        self._on_health = on_health
        self._look_on()

    def stop(self) -> None:
        """Looks no more."""
        if self._next:
            self._next.cancel()
            self._next = None

    def look(self) -> None:
        """Looks at once."""
        hung = self.hung()
        if bool(hung) is self.healthy:
            self.healthy = not hung
            if hung:
                logger.error("a run on the device hangs", limit_s=self._timeout_s)
            else:
                logger.info("the run on the device came back")
            self._on_health(self.healthy)
        if hung:
            self._abandon(hung)

    def _look_on(self) -> None:
        delay_s = self._timeout_s / _LOOKS
        self._next = asyncio.get_running_loop().call_later(delay_s, self._look_on)
        self.look()

    def hung(self) -> list[ModelInstance]:
        """Returns the instances whose run takes too long."""
        since_s = self._clock() - self._timeout_s
        return [
            instance
            for instance in self._instances
            if (started_at_s := instance.started_at_s) is not None and started_at_s < since_s
        ]
