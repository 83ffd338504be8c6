"""Images in a NumPy file: one array uint8 [N, H, W, 3]."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clients.batch.errors import InputError
from clients.batch.rows import Item
from clients.batch.shards import Shard

_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """The images of a `.npy` file; their keys are their numbers in it."""

    path: Path
    shape: tuple[int, int, int, int]
    data_offset_bytes: int
    numbers: range

    @classmethod
    def open(cls, path: Path, shard: Shard) -> "ArrayFile":
        """Reads the header.

        Raises:
            InputError: It is no such array.
        """
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: {error}") from error
        if (
            not isinstance(array, np.memmap)
            or array.dtype != np.uint8
            or array.ndim != 4
            or array.shape[3] != 3
            or not array.flags.c_contiguous
        ):
            found = f"{array.dtype} {list(array.shape)}" if hasattr(array, "dtype") else "others"
            raise InputError(f"{path}: expected an array uint8 [N, H, W, 3], got {found}")
        count, height, width, channels = array.shape
        return cls(path, (count, height, width, channels), array.offset, shard.of(count))

    @property
    def total(self) -> int:
        """Images in this shard."""
        return len(self.numbers)

    def items(self, start: int) -> Iterator[Item]:
        """Yields the images from number `start` of the shard on.

        The file is read, not mapped: mapped pages would count as this process's memory.
        """
        image_bytes = int(np.prod(self.shape[1:]))
        at_once = max(1, _READ_BYTES // max(1, image_bytes))
        numbers = self.numbers[start:]
        for first in range(numbers.start, numbers.stop, at_once):
            count = min(at_once, numbers.stop - first)
            flat = np.fromfile(
                self.path,
                np.uint8,
                count * image_bytes,
                offset=self.data_offset_bytes + first * image_bytes,
            )
            if flat.size != count * image_bytes:
                raise InputError(
                    f"{self.path}: ends inside image {first + flat.size // image_bytes}"
                )
            for number, image in enumerate(flat.reshape(count, *self.shape[1:]), first):
                yield Item(str(number), image)
