"""Images in a NumPy file: one array uint8 [N, H, W, 3]."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from convoy.client.batch.errors import InputError
from convoy.client.batch.items import Item, Shard
from convoy.client.urls import describe_error, open_binary

_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """The images of a `.npy` file; their keys are their numbers in it."""

    path: str
    shape: tuple[int, int, int, int]
    data_offset_bytes: int
    numbers: range

    @classmethod
    def open(cls, path: str, shard: Shard) -> "ArrayFile":
        """Read the header.

        Raises:
            InputError: It is not such an array.
        """
        try:
            with open_binary(path) as file:
                shape, in_columns, dtype = _read_header(file)
                offset_bytes = file.tell()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {describe_error(error)}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or in_columns:
            raise InputError(
                f"{path}: expected an array uint8 [N, H, W, 3], row by row, got {dtype} "
                f"{list(shape)}" + ", column by column" * in_columns
            )
        count, height, width, channels = shape
        return cls(path, (count, height, width, channels), offset_bytes, shard.of(count))

    @property
    def total(self) -> int:
        """The number of images in this shard."""
        return len(self.numbers)

    @property
    def left_out(self) -> Mapping[str, int]:
        """None."""
        return {}

    @property
    def failures(self) -> Mapping[str, str]:
        """None."""
        return {}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the images of the shard, from number `start`.

        The file is read, not mapped: mapped pages would count as this process's memory.

        Raises:
            InputError: It cannot be read, or is shorter than its header says.
        """
        image_bytes = int(np.prod(self.shape[1:]))
        at_once = max(1, _READ_BYTES // max(1, image_bytes))
        numbers = self.numbers[start:]
        try:
            with open_binary(self.path) as file:
                file.seek(self.data_offset_bytes + numbers.start * image_bytes)
                for first in range(numbers.start, numbers.stop, at_once):
                    count = min(at_once, numbers.stop - first)
                    flat = np.frombuffer(file.read(count * image_bytes), np.uint8)
                    if flat.size != count * image_bytes:
                        whole = first + flat.size // max(1, image_bytes)
                        raise InputError(f"{self.path}: ends inside image {whole}")
                    for number, image in enumerate(flat.reshape(count, *self.shape[1:]), first):
                        yield Item(str(number), image)
        except OSError as error:
            raise InputError(f"{self.path}: {describe_error(error)}") from error

    def keys(self, start: int) -> Iterator[str]:
        """Yield the numbers."""
        return map(str, self.numbers[start:])

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Return no columns: an array has none."""
        raise InputError(f"{self.path}: an array has no columns: {', '.join(names)}")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether the order is column-major, and dtype; leave the file at the data."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"expected version 1.0 or 2.0 of the format, got {version}")
    return read[version](file)
