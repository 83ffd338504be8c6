"""A model instance: a thread that takes batches when it is free and runs them on the device."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.errors import DeviceMemoryError
from server.requests import Batch, Images, Outputs, Part

Run = Callable[[Images], Outputs]
Allocate = Callable[[tuple[int, ...]], Images]


def _allocate(shape: tuple[int, ...]) -> Images:
    return np.empty(shape, np.uint8)


@dataclass(frozen=True, slots=True)
class Runner:
    """A model on a device, as its instances see it.

    Attributes:
        run: Runs a batch `[N, H, W, 3]`; called by several instances at once where there are. It
            returns arrays of its own, which it does not write to again.
        allocate: Makes an instance's batch buffer of a shape.
    """

    run: Run
    allocate: Allocate = _allocate


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of parts of a batch: of all of them, unless the model failed."""

    parts: tuple[Part, ...]
    result: Outputs | Exception


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came of a batch.

    Attributes:
        pieces: In the order of the batch's parts.
        padded_images: Rows run beyond the batch's own.
        largest_run: What to run at most from now on, None while memory sufficed.
    """

    pieces: tuple[Piece, ...]
    padded_images: int
    largest_run: int | None


class ModelInstance:
    """Runs batches from a source until it gives None.

    Args:
        number: Names the thread.
        device: The number of the device that it runs on.
        runner: The model on that device.
        buffer_shape: `[B, H, W, 3]` of this instance's own buffer, which every batch is gathered
            into: the only copy of pixels between the wire and the device.
        padded: The size that a batch of some size is run with.

    Attributes:
        device: The same.
        started_at_s: When the run under way began, None between runs; the watchdog reads it.
        free_at_s: When the run under way is expected to end.
        batch: The batch under way.
    """

    def __init__(
        self,
        number: int,
        device: int,
        runner: Runner,
        buffer_shape: tuple[int, ...],
        padded: Callable[[int], int],
    ) -> None:
        self.device = device
        self._number = number
        self._run = runner.run
        self._buffer = runner.allocate(buffer_shape)
        self._padded = padded
        self.started_at_s: float | None = None
        self.free_at_s = float("-inf")
        self.batch: Batch | None = None

    def start(self, serve: Callable[["ModelInstance"], None]) -> None:
        """Starts the thread, which does nothing but serve(self)."""
        threading.Thread(
            target=serve, args=(self,), name=f"model-instance-{self._number}", daemon=True
        ).start()

    @property
    def is_idle(self) -> bool:
        """Whether no run is under way."""
        return self.started_at_s is None

    def begin(self, batch: Batch) -> None:
        """Notes the batch that it runs next."""
        self.batch = batch
        self.started_at_s = batch.sealed_at_s
        self.free_at_s = batch.sealed_at_s + batch.predicted_s

    def end(self, now_s: float) -> None:
        """Notes that it is free."""
        self.started_at_s = self.batch = None
        self.free_at_s = now_s

    def run(self, batch: Batch) -> BatchResult:
        """Runs a batch; whatever the model raises becomes the result of the parts it failed on."""
        pieces: list[Piece] = []
        largest: int | None = None
        todo = [batch.parts]
        while todo:
            parts = todo.pop()
            try:
                pieces.append(Piece(parts, self._run_together(parts)))
            except DeviceMemoryError as error:
                size = sum(part.size for part in parts)
                largest = max(1, size // 2)
                if size == 1:
                    pieces.append(Piece(parts, error))
                else:
                    todo.extend(reversed(_halve_images(parts, size)))
            except Exception as error:  # whatever the model raises ends the parts it fails on only
                if len(parts) == 1:
                    pieces.append(Piece(parts, error))
                else:
                    middle = len(parts) // 2
                    todo.extend((parts[middle:], parts[:middle]))
        padding = self._padded(batch.size) - batch.size if len(pieces) == 1 else 0
        return BatchResult(tuple(pieces), padding, largest)

    def _run_together(self, parts: tuple[Part, ...]) -> Outputs:
        end = 0
        for part in parts:
            start, end = end, end + part.size
            self._buffer[start:end] = part.images
        padded = self._padded(end)
        outputs = self._run(self._buffer[:padded])
        return outputs if padded == end else outputs.rows(0, end)


def _halve_images(parts: tuple[Part, ...], size: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Splits at the middle image, inside a request if need be."""
    room = size // 2
    first: list[Part] = []
    second: list[Part] = []
    for part in parts:
        cut = part.start + min(part.size, max(room, 0))
        if cut > part.start:
            first.append(Part(part.request, part.start, cut))
        if cut < part.stop:
            second.append(Part(part.request, cut, part.stop))
        room -= part.size
    return tuple(first), tuple(second)
