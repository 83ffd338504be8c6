"""Running batches through a torch module, which both of torch's formats do alike."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from server.errors import DeviceMemoryError
from server.requests import Images, Outputs

Module = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ModuleRunner:
    """Runs batches through a module, from several threads at once.

    On CUDA each batch under way has a stream of its own, so that the copies of one overlap the
    work of another; on the default stream one would wait for the other. A stream is used again by
    the next batch, and with it the memory that torch keeps for it.

    Args:
        module: Maps images to the tuple (logits, probabilities).
        device: Where it lies.
    """

    def __init__(self, module: Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._idle_streams: list[torch.cuda.Stream] = []

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`; afterwards nothing reads the images any more.

        Raises:
            DeviceMemoryError: The device has no memory for it.
        """
        try:
            with torch.inference_mode(), self._stream():
                # From page-locked memory the device copies by itself.
                pixels = torch.from_numpy(images).to(self._device, non_blocking=True)
                logits, probabilities = self._module(pixels)
                # Waits for all that the stream was given, the copy of the images included.
                return Outputs(logits.cpu().numpy(), probabilities.cpu().numpy())
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(f"no memory for {len(images)} images") from error

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        try:
            stream = self._idle_streams.pop()
        except IndexError:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # The weights were put there on the default stream.
            stream.wait_stream(torch.cuda.default_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._idle_streams.append(stream)
