"""OpenVINO on the CPU: another runtime for the ONNX artefact."""

import functools
import io
import queue
import re
from typing import Any

from server.backends.devices import Device
from server.backends.onnx_file import OUTPUT_NAMES, check_self_contained
from server.backends.openvino_import import openvino
from server.errors import DeviceError, DeviceMemoryError, RepositoryError
from server.manifest import TensorSpec
from server.repository import VerifiedFile
from server.requests import Images, Outputs

# What it says where an allocation failed; there is no exception type for it.
_OUT_OF_MEMORY = re.compile(r"Failed to allocate|bad_alloc|out of memory", re.IGNORECASE)
_DATATYPES = {openvino.Type.u8: "UINT8", openvino.Type.f32: "FP32"}


class OpenVinoBackend:
    """An ONNX graph with input `image` and outputs `logits`, `probabilities`, on the CPU.

    The graph is compiled once for each instance, so that instances share nothing and each runs in
    the thread that calls it. With one compiled graph and a stream for each instance, every batch
    would be handed to a thread of OpenVINO's and back.

    Args:
        file: The artefact.
        device: Must be the CPU.
        threads: For one batch.
        instances: Batches that run side by side; more callers than that wait.
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
        # First in, first out: runs of one caller, as in warming up, go round all instances.
        self._idle: queue.SimpleQueue[openvino.InferRequest | None] = queue.SimpleQueue()
        for each in compiled:
            self._idle.put(each.create_infer_request())
        self.device = str(device)
        executed_on = compiled[0].get_property("EXECUTION_DEVICES")
        self.provider = "openvino-" + ",".join(executed_on).lower()
        self.inputs = tuple(map(_tensor, compiled[0].inputs))
        self.outputs = tuple(map(_tensor, compiled[0].outputs))

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`."""
        request = self._idle.get()
        try:
            if request is None:
                request = self._compile().create_infer_request()
            # Shared: the images are read where they lie. The outputs are copies.
            scores = request.infer([images], share_inputs=True, share_outputs=False)
            return Outputs(*(scores[name] for name in OUTPUT_NAMES))
        except Exception as error:
            # The graph keeps shapes of a run that failed, which would spoil a later one.
            request = None
            if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
                raise DeviceMemoryError(f"no memory for {len(images)} images") from error
            raise
        finally:
            self._idle.put(request)

    def _compile(self) -> openvino.CompiledModel:
        return _core().compile_model(self._model, "CPU", self._settings)


@functools.cache
def _core() -> openvino.Core:
    """One that stays.

    With the last of them OpenVINO unloads its part for CPUs, which frees the stack that it gave to
    the signal handlers of the thread that loaded it: the next signal there would end the process.
    """
    return openvino.Core()


def _read(content: bytes) -> openvino.Model:
    # By name: left to itself OpenVINO asks the reader of each format that it knows.
    reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(io.BytesIO(content)))


def _settings(threads: int) -> dict[str, Any]:
    return {
        # Left to itself it computes in bfloat16 where the processor can, which is another
        # precision with a gate of its own.
        "INFERENCE_PRECISION_HINT": "f32",
        # Without a stream a run stays in its caller's thread. So it does with one stream of one
        # thread, but there OpenVINO (2025.4 to 2026.4) drops the error of a run that fails and
        # returns what the run before it left.
        "NUM_STREAMS": 0 if threads == 1 else 1,
        "INFERENCE_NUM_THREADS": threads,
        # Pinned threads would stand in the way of the front end's.
        "ENABLE_CPU_PINNING": False,
    }


def _tensor(port: openvino.ConstOutput) -> TensorSpec:
    names = port.get_names()
    return TensorSpec(
        next((name for name in OUTPUT_NAMES if name in names), port.get_any_name()),
        _DATATYPES.get(port.element_type, port.element_type.to_string()),
        # An axis that may vary has no fixed length.
        tuple(-1 if size.is_dynamic else size.get_length() for size in port.partial_shape),
    )
