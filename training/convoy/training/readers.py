"""Images by index, as uint8 batches on the device: from memory, or decoded when needed."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from convoy.training.augment import ImageAugmentation
from convoy.training.data import ImageFiles, ImageSet
from convoy.training.errors import DataError

_log = logging.getLogger(__name__)

_AHEAD = 2
_TRIES = 10
_AS_IT_IS = -1


class Reader(Protocol):
    """A source of batches."""

    labels: Tensor
    """`[N]` int64, on the device."""

    def read(self, batches: Sequence[Tensor], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield the pixels `[M, H, W, 3]` uint8 of each batch of indices `[M]`, on the device.

        Args:
            batches: The indices.
            epoch: Which draw of an augmentation to take; None takes the images as they are.
        """
        ...


class MemoryReader:
    """The whole set as one uint8 tensor on the device."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self._pixels = torch.from_numpy(images.images).to(device)  # [N, H, W, 3]
        self.labels = torch.from_numpy(images.labels).to(device)

    def read(self, batches: Sequence[Tensor], epoch: int | None = None) -> Iterator[Tensor]:
        """See `Reader`."""
        for indices in batches:
            # Copies whole images, which takes a tenth of the time of indexing.
            yield self._pixels.index_select(0, indices.to(self._pixels.device))


class FileReader:
    """Decodes or augments images in worker processes, some batches ahead of the training.

    Args:
        images: The files.
        device: Device of the batches.
        workers: Processes; 0 decodes in this one.
        skip_bad: Replace a file that becomes unreadable by another image of its class, with a
            warning for each, instead of ending the run.
        augmentation: Of each image, in the epochs of the training.
    """

    def __init__(
        self,
        images: ImageSet | ImageFiles,
        device: torch.device,
        workers: int,
        skip_bad: bool = False,
        augmentation: ImageAugmentation | None = None,
    ) -> None:
        self._skip_bad = skip_bad
        self._faults: set[str] = set()
        self.labels = torch.from_numpy(images.labels).to(device)
        self._device = device
        self._plan: list[list[tuple[int, int]]] = []
        # The loader iterates over this list at each pass; it is filled anew before.
        self._loader: Iterable[tuple[Tensor, list[str]]] = DataLoader(
            _Decoded(images, augmentation),
            batch_sampler=self._plan,
            num_workers=workers,
            # Forking a process with threads can deadlock.
            multiprocessing_context="forkserver" if workers else None,
            persistent_workers=workers > 0,
            prefetch_factor=_AHEAD if workers else None,
            pin_memory=device.type == "cuda",
        )

    def read(self, batches: Sequence[Tensor], epoch: int | None = None) -> Iterator[Tensor]:
        """See `Reader`.

        Raises:
            DataError: A file became unreadable.
        """
        draw = _AS_IT_IS if epoch is None else epoch
        self._plan[:] = [[(index, draw) for index in indices.tolist()] for indices in batches]
        for pixels, faults in self._loader:
            self._check(faults)
            yield pixels.to(self._device, non_blocking=True)

    def _check(self, faults: Sequence[str]) -> None:
        for fault in sorted({*faults} - self._faults - {""}):
            if not self._skip_bad:
                raise DataError(f"data: unreadable since the start of the run: {fault}")
            self._faults.add(fault)
            _log.warning(
                "data: replaced an unreadable image by another of its class, %d so far: %s",
                len(self._faults),
                fault,
            )


class _Decoded(TorchDataset[tuple[Tensor, str]]):
    """Images, each with an empty text or the reason why another image replaces it."""

    def __init__(
        self, images: ImageSet | ImageFiles, augmentation: ImageAugmentation | None
    ) -> None:
        self._images = images
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str]:
        index, epoch = key
        try:
            return self._read(index, epoch), ""
        except DataError as error:
            # A worker's exception would arrive as the text of its traceback.
            return self._substitute(index, epoch), str(error)

    def _read(self, index: int, epoch: int) -> Tensor:
        if self._augmentation is None or epoch == _AS_IT_IS:
            return torch.from_numpy(self._images.read([index])[0])
        return self._augmentation(self._images.original(index), epoch, index)

    def _substitute(self, index: int, epoch: int) -> Tensor:
        """Return the next readable image of the class.

        Raises:
            DataError: None of the next ten is readable.
        """
        members = np.flatnonzero(self._images.labels == self._images.labels[index])
        for other in np.roll(members, -int(np.searchsorted(members, index)) - 1)[:_TRIES]:
            try:
                return self._read(int(other), epoch)
            except DataError:
                continue
        raise DataError(f"expected a readable image among {_TRIES} of a class, got none")


def make_reader(
    images: ImageSet | ImageFiles,
    device: torch.device,
    workers: int,
    skip_bad: bool = False,
    augmentation: ImageAugmentation | None = None,
) -> Reader:
    """Return the reader that fits the set: `workers` decode what is not in memory, and augment."""
    if isinstance(images, ImageSet) and augmentation is None:
        return MemoryReader(images, device)
    return FileReader(images, device, workers, skip_bad, augmentation)
