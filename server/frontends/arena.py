"""Shares out a piece of memory."""

import mmap

import numpy as np

from server.errors import OverloadedError
from server.requests import Images

_LEAST_BITS = 12


class Arena:
    """Places images in memory that another process maps as well.

    Blocks are powers of two, split and joined again as buddies (Knowlton, "A fast storage
    allocator", CACM 8, 1965), so that any mix of sizes leaves no holes behind.

    Args:
        memory: Its size is a power of two, of 4 KiB at least.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._orders = len(memory).bit_length() - _LEAST_BITS
        self._free: list[set[int]] = [set() for _ in range(self._orders)]
        self._free[-1].add(0)
        self._taken: dict[int, int] = {}

    def place(self, images: Images) -> int:
        """Copies images into the memory and returns where they begin.

        Raises:
            OverloadedError: There is no room for them.
        """
        offset = self._take(images.nbytes)
        view = np.frombuffer(self._memory, np.uint8, images.nbytes, offset)
        view.reshape(images.shape)[:] = images
        return offset

    def free(self, offset: int) -> None:
        """Takes back what begins there."""
        order = self._taken.pop(offset)
        while order + 1 < self._orders:
            buddy = offset ^ (1 << order + _LEAST_BITS)
            if buddy not in self._free[order]:
                break
            self._free[order].discard(buddy)
            offset = min(offset, buddy)
            order += 1
        self._free[order].add(offset)

    def _take(self, size_bytes: int) -> int:
        order = max(0, (size_bytes - 1).bit_length() - _LEAST_BITS)
        found = next((each for each in range(order, self._orders) if self._free[each]), None)
        if found is None:
            raise OverloadedError(f"the front end has no room for {size_bytes} bytes of pixels")
        offset = self._free[found].pop()
        while found > order:
            found -= 1
            self._free[found].add(offset + (1 << found + _LEAST_BITS))
        self._taken[offset] = order
        return offset
