"""How many images are under way: additive increase, multiplicative decrease.

A server with room answers; the window grows, doubling each round until the first refusal and by one
each round after it. A refusal halves it, once for all requests that were sent under the same size
(Chiu and Jain, 1989).
"""

import asyncio


class AdaptiveWindow:
    """Bounds the images under way to what the server takes.

    Args:
        largest: Above which it does not grow.
        initial: Where it begins.
    """

    def __init__(self, largest: int, initial: int = 32) -> None:
        self._largest = largest
        self._size = float(min(initial, largest))
        self._cuts = 0
        self._in_use = 0
        self._changed = asyncio.Condition()

    @property
    def size(self) -> int:
        """Images that may be under way."""
        return int(self._size)

    async def enter(self, images: int) -> int:
        """Waits for so many places, or until nobody else has any; returns a ticket for `leave`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(images))
            self._in_use += images
            return self._cuts

    async def leave(self, ticket: int, images: int, *, refused: bool) -> None:
        """Gives places back and says how the request went."""
        async with self._changed:
            self._in_use -= images
            if not refused:
                step = images / self._size if self._cuts else images
                self._size = min(self._largest, self._size + step)
            elif ticket == self._cuts:
                self._cuts += 1
                self._size = max(1, self._size / 2)
            self._changed.notify_all()

    def _has_room(self, images: int) -> bool:
        return self._in_use == 0 or self._in_use + images <= self.size
