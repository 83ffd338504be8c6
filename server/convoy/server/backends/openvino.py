"""OpenVINO on the CPU: another runtime for the ONNX artifact.

The package `openvino` comes with `openvino_telemetry`: every import of it forks a process that
reports to Google Analytics, and writes to ~/intel. OpenVINO works where it cannot be imported.
"""

import functools
import io
import queue
import sys
from typing import Any

from convoy.server.backends.base import is_out_of_memory
from convoy.server.backends.device import Device
from convoy.server.backends.onnx_check import OUTPUT_NAMES, check_self_contained
from convoy.server.errors import DeviceError, DeviceMemoryError, RepositoryError
from convoy.server.models.manifest import TensorSpec
from convoy.server.models.repository import VerifiedFile
from convoy.server.requests import Images, Outputs

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # noqa: E402

_DATATYPES = {openvino.Type.u8: "UINT8", openvino.Type.f32: "FP32"}


class OpenVinoBackend:
    """An ONNX graph with input `image` and outputs `logits`, `probabilities`, on the CPU.

    The graph is compiled once for each instance, so that instances share nothing and each runs in
    the thread that calls it. With one compiled graph and a stream for each instance, OpenVINO would
    move every batch to a thread of its own and back.

    Args:
        file: The artifact.
        device: Must be the CPU.
        threads: CPU threads for one batch.
        instances: Batches that run at the same time; further callers wait.
    """

    platform = "openvino_onnxv1"
    # The batch axis stays open in the compiled graph.
    fixed_shapes = False

    def __init__(self, file: VerifiedFile, device: Device, threads: int, instances: int) -> None:
        if device.kind != "cpu":
            raise DeviceError(f"device {device}: OpenVINO runs on the CPU only, --device cpu")
        check_self_contained(file)
        self._settings = _settings(threads)
        try:
            self._model = _read(file.content)
            compiled = [self._compile() for _ in range(instances)]
        except Exception as error:
            # There is no common exception type; its messages hold paths and stay in the log.
            raise RepositoryError(f"{file.name}: OpenVINO cannot load it") from error
        # First in, first out: the runs of one caller, such as the warm-up, use every instance.
        self._idle: queue.SimpleQueue[openvino.InferRequest | None] = queue.SimpleQueue()
        for each in compiled:
            self._idle.put(each.create_infer_request())
        self.device = str(device)
        executed_on = compiled[0].get_property("EXECUTION_DEVICES")
        self.provider = "openvino-" + ",".join(executed_on).lower()
        self.inputs = tuple(map(_tensor, compiled[0].inputs))
        self.outputs = tuple(map(_tensor, compiled[0].outputs))

    def run(self, images: Images) -> Outputs:
        """Run a batch `[N, H, W, 3]`."""
        request = self._idle.get()
        try:
            if request is None:
                request = self._compile().create_infer_request()
            # The images are read in place; the outputs are copies.
            scores = request.infer([images], share_inputs=True, share_outputs=False)
            return Outputs(*(scores[name] for name in OUTPUT_NAMES))
        except Exception as error:
            # The graph keeps the shapes of a failed run, which would corrupt a later one.
            request = None
            if is_out_of_memory(error):
                raise DeviceMemoryError(f"no memory for {len(images)} images") from error
            raise
        finally:
            self._idle.put(request)

    def release_unused(self, image: Images) -> None:
        """Do nothing: OpenVINO has no call for it."""

    def close(self) -> None:
        """Release the compiled graphs."""
        self._idle = queue.SimpleQueue()
        del self._model

    def _compile(self) -> openvino.CompiledModel:
        return _core().compile_model(self._model, "CPU", self._settings)


@functools.cache
def _core() -> openvino.Core:
    """Return the one core of the process.

    With the last core OpenVINO unloads its CPU plug-in, which frees the stack that it gave to the
    signal handlers of the thread that loaded it: the next signal there would end the process.
    """
    return openvino.Core()


def _read(content: bytes) -> openvino.Model:
    # By name: by default OpenVINO tries the reader of every format that it knows.
    reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(io.BytesIO(content)))


def _settings(threads: int) -> dict[str, Any]:
    return {
        # By default it computes in bfloat16 where the processor can: another precision, which has a
        # tolerance of its own.
        "INFERENCE_PRECISION_HINT": "f32",
        # Without a stream a run stays in its caller's thread. With one stream of one thread it does
        # too, but then OpenVINO (2025.4 to 2026.4) drops the error of a failed run and returns the
        # outputs of the run before it.
        "NUM_STREAMS": 0 if threads == 1 else 1,
        "INFERENCE_NUM_THREADS": threads,
        # Pinned threads would compete with the event loop.
        "ENABLE_CPU_PINNING": False,
    }


def _tensor(port: openvino.ConstOutput) -> TensorSpec:
    names = port.get_names()
    return TensorSpec(
        next((name for name in OUTPUT_NAMES if name in names), port.get_any_name()),
        _DATATYPES.get(port.element_type, port.element_type.to_string()),
        # A variable axis has no fixed length.
        tuple(-1 if size.is_dynamic else size.get_length() for size in port.partial_shape),
    )
