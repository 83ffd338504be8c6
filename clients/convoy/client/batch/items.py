"""What passes through a batch job: a source yields items, an engine turns them into rows."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from convoy.client.batch.errors import InputError
from convoy.client.errors import ImageError
from convoy.client.urls import without_secrets

T = TypeVar("T")
Floats = NDArray[np.float32]

_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")
_MAX_ERROR_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """One input.

    Attributes:
        key: The `path` of its row: a path, an archive member's name, a row's key or number.
        image: A file's path, a file's bytes, RGB pixels `[H, W, 3]`, or the error of reading them.
    """

    key: str
    image: str | bytes | NDArray[np.uint8] | ImageError


@dataclass(frozen=True, slots=True)
class Row:
    """One output: the most probable classes of an item in descending order, or its error.

    Its texts can be written in any format: what is not UTF-8 is escaped, an error is one line.

    Attributes:
        true_label: The item's class as the input gives it, if the job evaluates.
        columns: Further values: other columns of the input, and outputs of the model float32 [D].
    """

    key: str
    labels: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    model: str | None = None
    version: int | None = None
    error: str | None = None
    true_label: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.key.isascii():
            object.__setattr__(self, "key", printable(self.key))
        if self.error is not None:
            error = " ".join(printable(without_secrets(self.error)).split())
            object.__setattr__(self, "error", error[:_MAX_ERROR_CHARACTERS] or "unknown error")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`; together the disjoint parts hold all inputs."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "I/N", counted from 0.

        Raises:
            InputError: It does not have this form, or I is not below N.
        """
        match = _SHARD.fullmatch(text)
        if not match or int(match[1]) >= int(match[2]):
            raise InputError(f"--shard: expected I/N with I from 0 to N-1, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def of(self, total: int) -> range:
        """Return the numbers of the shard's inputs, of `total` inputs numbered from 0."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def name(self, out: Path) -> Path:
        """Return the shard's own table: out-00001-of-00004.csv."""
        if self.count == 1:
            return out
        return out.with_name(f"{out.stem}-{self.index:05}-of-{self.count:05}{out.suffix}")


class Source(Protocol):
    """Numbered inputs: the same ones in the same order each time."""

    @property
    def total(self) -> int:
        """The number of inputs."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """The number of entries that are not images, by reason."""

    @property
    def failures(self) -> Mapping[str, str]:
        """Whole inputs that cannot be read, with the reason; each is one item."""

    def items(self, start: int) -> Iterator[Item]:
        """Yield the inputs from number `start` on, from 0."""

    def keys(self, start: int) -> Iterator[str]:
        """Yield the keys of the same inputs, without reading images."""

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Yield the values of other columns of the same inputs.

        Raises:
            InputError: The input has no such column.
        """


def best_classes(
    probabilities: Floats, labels: NDArray[np.object_], top_k: int
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...]]]:
    """Yield the labels, indices and probabilities of the most probable classes of each image.

    Args:
        probabilities: `[n, K]`.
        labels: `[K]`.
        top_k: How many; all if there are fewer. If equal, the lower index is first.
    """
    best = _largest(probabilities, top_k)  # [n, k]
    chosen = np.take_along_axis(probabilities, best, axis=1)
    return zip(
        map(tuple, labels[best].tolist()),
        map(tuple, best.tolist()),
        map(tuple, chosen.tolist()),
        strict=True,
    )


def with_outputs(rows: Sequence[Row], outputs: Mapping[str, Floats]) -> list[Row]:
    """Add outputs `[n, D]` of a model to those n rows that have no error."""
    values = (dict(zip(outputs, each, strict=True)) for each in zip(*outputs.values(), strict=True))
    return [row if row.error else replace(row, columns=next(values)) for row in rows]


def _largest(values: Floats, count: int) -> NDArray[np.intp]:
    """Return the positions of the largest values of each row in descending order; ties by index."""
    if count == 1:
        best: NDArray[np.intp] = np.argmax(values, axis=1)
        return best[:, np.newaxis]
    order: NDArray[np.intp] = np.argsort(-values, axis=1, kind="stable")
    return order[:, :count]


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` values, the last one shorter."""
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def printable(text: str) -> str:
    """Return the text with escapes for all that UTF-8 cannot encode, e.g. bytes of a file name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            encoded = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            encoded = text.encode("utf-8", "surrogatepass")
        return encoded.decode("utf-8", "backslashreplace")
    return text
