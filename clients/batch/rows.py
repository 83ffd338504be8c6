"""What goes through a batch job: items in, rows out."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One input.

    Attributes:
        key: What its row calls it: a path, a tar member's name, a row's key or number.
        image: A file's path, a file's bytes, or RGB pixels `[H, W, 3]`.
    """

    key: str
    image: str | bytes | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Row:
    """One output: the most probable classes of an item in falling order, or its error."""

    key: str
    labels: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    model: str | None = None
    version: int | None = None
    error: str | None = None


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size` values, the last one shorter."""
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
