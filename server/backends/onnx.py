"""ONNX Runtime on CPU or CUDA."""

import re
from typing import Any

import onnxruntime as ort

from server.backends.devices import Device
from server.backends.onnx_bound import BoundSession
from server.backends.onnx_file import OUTPUT_NAMES, check_self_contained
from server.errors import DeviceError, DeviceMemoryError, RepositoryError
from server.manifest import TensorSpec
from server.repository import VerifiedFile
from server.requests import Images, Outputs

_CPU_PROVIDER = "CPUExecutionProvider"
_CUDA_PROVIDER = "CUDAExecutionProvider"
# What its arena, CUDA and cuDNN say; there is no exception type for it.
_OUT_OF_MEMORY = re.compile(r"Failed to allocate memory|out of memory|ALLOC_FAILED", re.IGNORECASE)
_DATATYPES = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32"}


class OnnxBackend:
    """An ONNX graph with input `image` and outputs `logits`, `probabilities`."""

    platform = "onnx_onnxv1"

    def __init__(
        self, file: VerifiedFile, device: Device, threads: int, cuda_graphs: bool = False
    ) -> None:
        check_self_contained(file)
        if device.kind == "cuda":
            # Finds the CUDA libraries that came as Python packages.
            ort.preload_dlls()
        wanted = _CUDA_PROVIDER if device.kind == "cuda" else _CPU_PROVIDER
        try:
            self._session = ort.InferenceSession(
                file.content,
                _session_options(device, threads),
                providers=_providers(device, cuda_graphs),
            )
        except Exception as error:
            # onnxruntime has no common exception type; its messages hold paths and stay in the log.
            if device.kind == "cuda":
                raise DeviceError(
                    f"device {device}: ONNX Runtime cannot run the model there"
                ) from error
            raise RepositoryError(f"{file.name}: ONNX Runtime cannot load it") from error
        # A run that fails on the device shall fail: by default it is tried again on the CPU, for
        # which the session would keep the file's bytes for good.
        self._session.disable_fallback()
        self._session._model_bytes = None
        self.provider = str(self._session.get_providers()[0])
        # A failed provider does not raise: the session silently holds another one.
        if self.provider != wanted:
            raise DeviceError(
                f"device {device}: expected {wanted}, ONNX Runtime took {self.provider}"
            )
        self.device = str(device)
        self.fixed_shapes = device.kind == "cuda"
        self.inputs = _tensors(self._session.get_inputs())
        self.outputs = _tensors(self._session.get_outputs())
        self._input = self._session.get_inputs()[0].name
        self._bound = BoundSession(self._session, device) if cuda_graphs else None

    def run(self, images: Images) -> Outputs:
        """Runs a batch `[N, H, W, 3]`."""
        try:
            if self._bound:
                return self._bound.run(images)
            return Outputs(*self._session.run(OUTPUT_NAMES, {self._input: images}))
        except Exception as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise DeviceMemoryError(f"no memory for {len(images)} images") from error
            raise


def _tensors(declared: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            tensor.name,
            _DATATYPES.get(tensor.type, tensor.type),
            # A named axis is one that may vary.
            tuple(size if isinstance(size, int) else -1 for size in tensor.shape),
        )
        for tensor in declared
    )


def _session_options(device: Device, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would burn the cores that the gRPC front end needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device.kind == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _providers(device: Device, cuda_graphs: bool) -> list[str | tuple[str, dict[str, Any]]]:
    if device.kind == "cpu":
        return [_CPU_PROVIDER]
    cuda = {
        "device_id": device.index,
        # The default search times every kernel again for each new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": int(cuda_graphs),
    }
    return [(_CUDA_PROVIDER, cuda)]
