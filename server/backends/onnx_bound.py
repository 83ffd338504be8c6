"""Runs an ONNX session over buffers on the device that stay where they are."""

import threading
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from server.backends.devices import Device
from server.backends.onnx_file import OUTPUT_NAMES
from server.requests import Images, Outputs


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Input and outputs of one batch size, bound to a session."""

    images: ort.OrtValue  # [N, H, W, 3] uint8
    outputs: tuple[ort.OrtValue, ...]  # each [N, K] float32
    binding: ort.IOBinding
    options: ort.RunOptions


class BoundSession:
    """Runs batches through buffers of their own size, made when a size is first met.

    A CUDA graph replays the addresses and shapes that it was captured with, so one is captured for
    each set of buffers (ONNX Runtime's documentation of `enable_cuda_graph`). Sizes are few: the
    batcher pads to those that were warmed up.

    Args:
        session: With the input and the outputs of a classifier.
        device: Where it runs.
    """

    def __init__(self, session: ort.InferenceSession, device: Device) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._place = (device.kind, device.index)
        self._classes = session.get_outputs()[0].shape[1]
        self._by_size: dict[int, _Buffers] = {}
        self._lock = threading.Lock()

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`; batches run one after another."""
        with self._lock:
            if len(images) not in self._by_size:
                self._by_size[len(images)] = self._bind(images)
            buffers = self._by_size[len(images)]
            buffers.images.update_inplace(np.ascontiguousarray(images))
            self._session.run_with_iobinding(buffers.binding, buffers.options)
            # On a CPU numpy() is a view of the buffer, which the next batch overwrites.
            return Outputs(*(value.numpy().copy() for value in buffers.outputs))

    def _bind(self, images: Images) -> _Buffers:
        count = len(images)
        binding, options = self._session.io_binding(), ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(count))
        # Not from the images themselves: on a CPU the buffer would be the caller's memory.
        given = self._allocate(images.shape, np.uint8)
        binding.bind_ortvalue_input(self._input, given)
        outputs = []
        for name in OUTPUT_NAMES:
            value = self._allocate((count, self._classes), np.float32)
            binding.bind_ortvalue_output(name, value)
            outputs.append(value)
        return _Buffers(given, tuple(outputs), binding, options)

    def _allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._place)
