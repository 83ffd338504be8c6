"""How many requests are under way: additive increase, multiplicative decrease.

A server with room answers; the window grows, doubling each round until the first refusal and by one
each round after it. A refusal halves it, once for all requests that were sent under the same size
(Chiu and Jain, 1989).
"""

import asyncio
from collections import deque


class AdaptiveWindow:
    """Bounds the requests under way to what the server takes.

    Args:
        largest: Above which it does not grow.
        initial: Where it begins.
    """

    def __init__(self, largest: int, initial: int = 8) -> None:
        self._largest = largest
        self._size = float(min(initial, largest))
        self._cuts = 0
        self._in_use = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """Requests that may be under way."""
        return int(self._size)

    async def enter(self) -> int:
        """Waits for a place; returns a ticket for `leave`."""
        while self._in_use >= self.size:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place
        self._in_use += 1
        return self._cuts

    def leave(self, ticket: int, *, refused: bool) -> None:
        """Gives a place back and says how the request went."""
        self._in_use -= 1
        if not refused:
            step = 1 / self._size if self._cuts else 1
            self._size = min(self._largest, self._size + step)
        elif ticket == self._cuts:
            self._cuts += 1
            self._size = max(1, self._size / 2)
        free = self.size - self._in_use
        while free > 0 and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1
