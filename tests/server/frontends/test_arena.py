"""The memory that a front end shares with its owner."""

import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.server.errors import OverloadedError
from convoy.server.frontends.ipc import Arena

SIZE_BYTES = 1 << 20
PAGE_BYTES = 4096


def pixels(size_bytes: int, value: int) -> np.ndarray:
    return np.full((1, 1, size_bytes), value, np.uint8)


@given(st.lists(st.tuples(st.integers(1, SIZE_BYTES // 4), st.integers(0, 9)), max_size=200))
def test_what_is_placed_stays_as_it_is_until_it_is_freed(steps):
    memory = mmap.mmap(-1, SIZE_BYTES)
    arena = Arena(memory)
    placed: list[tuple[int, np.ndarray]] = []
    for number, (size_bytes, freed) in enumerate(steps):
        images = pixels(size_bytes, number % 256)
        try:
            placed.append((arena.place(images), images))
        except OverloadedError:
            assert placed
        for offset, expected in placed:
            found = np.frombuffer(memory, np.uint8, expected.nbytes, offset)
            assert (found == expected.reshape(-1)).all()
        if freed < len(placed):
            arena.free(placed.pop(freed)[0])
    for offset, _ in placed:
        arena.free(offset)
    # All blocks are joined again.
    assert arena.place(pixels(SIZE_BYTES, 1)) == 0


def test_a_full_arena_rejects_and_names_the_size():
    arena = Arena(mmap.mmap(-1, 4 * PAGE_BYTES))
    offsets = [arena.place(pixels(PAGE_BYTES, 0)) for _ in range(4)]
    assert sorted(offsets) == [0, PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES]
    with pytest.raises(OverloadedError, match="100 bytes"):
        arena.place(pixels(100, 0))
    arena.free(PAGE_BYTES)
    assert arena.place(pixels(100, 0)) == PAGE_BYTES
