"""ONNX Runtime on CPU, or on CUDA by its own kernels or TensorRT's."""

import contextlib
import importlib
import os
import re
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog

from convoy.server.backends.base import is_out_of_memory
from convoy.server.backends.device import CudaOptions, Device, TensorRt
from convoy.server.backends.onnx_check import (
    OUTPUT_NAMES,
    activation_nodes,
    check_placement,
    check_self_contained,
)
from convoy.server.errors import DeviceError, DeviceMemoryError, RepositoryError
from convoy.server.models.manifest import TensorSpec
from convoy.server.models.repository import VerifiedFile
from convoy.server.requests import Images, Outputs

logger = structlog.get_logger()

_CPU_PROVIDER = "CPUExecutionProvider"
_CUDA_PROVIDER = "CUDAExecutionProvider"
_TENSORRT_PROVIDER = "TensorrtExecutionProvider"
_DATATYPES = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32"}
# A run with this id neither captures a CUDA graph nor replays one.
_NO_GRAPH = "-1"
_CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;]*\w")


class OnnxBackend:
    """An ONNX graph with input `image` and outputs `logits`, `probabilities`.

    Args:
        file: The artifact.
        device: The device to run on.
        threads: CPU threads for one batch.
        cuda: How it runs on CUDA. With graphs the model must be run by one thread only.

    Raises:
        DeviceError: The device cannot be used, or nodes that compute would run beside it.
        RepositoryError: ONNX Runtime cannot read the file.
    """

    platform = "onnx_onnxv1"

    def __init__(
        self, file: VerifiedFile, device: Device, threads: int, cuda: CudaOptions | None = None
    ) -> None:
        cuda = cuda or CudaOptions()
        graph = check_self_contained(file)
        on_cuda = device.kind == "cuda"
        if on_cuda:
            _load_libraries(cuda.tensorrt)
        providers = _providers(device, cuda)
        wanted = _name(providers[0])
        try:
            self._session = ort.InferenceSession(
                file.content, _session_options(device, threads), providers=providers
            )
        except Exception as error:
            # onnxruntime has no common exception type; its messages hold paths and stay in the log.
            if on_cuda:
                raise DeviceError(
                    f"device {device}: ONNX Runtime cannot run the model there"
                ) from error
            raise RepositoryError(f"{file.name}: ONNX Runtime cannot load it") from error
        # By default a run that fails on the device is repeated on the CPU, and the session keeps
        # the file's bytes for that.
        self._session.disable_fallback()
        self._session._model_bytes = None
        self.provider = str(self._session.get_providers()[0])
        # A provider that fails to load raises nothing: the session silently holds another one.
        if self.provider != wanted:
            raise DeviceError(
                f"device {device}: expected {wanted}, ONNX Runtime took {self.provider}"
            )
        if on_cuda:
            try:
                check_placement(_nodes_on_cpu(self._session), activation_nodes(graph))
            except DeviceError as error:
                raise DeviceError(f"{file.name}: device {device}: {error}") from error
        self.device = str(device)
        self.fixed_shapes = on_cuda
        self.inputs = _tensors(self._session.get_inputs())
        self.outputs = _tensors(self._session.get_outputs())
        self._input = self._session.get_inputs()[0].name
        self._arena = f"gpu:{device.index}" if on_cuda else "cpu:0"
        self._bound = BoundSession(self._session, device, cuda) if cuda.graphs else None

    def run(self, images: Images) -> Outputs:
        """Run a batch `[N, H, W, 3]`."""
        try:
            if self._bound:
                return self._bound.run(images)
            return self._run(images)
        except Exception as error:
            if is_out_of_memory(error):
                raise DeviceMemoryError(f"no memory for {len(images)} images") from error
            raise

    def release_unused(self, image: Images) -> None:
        """Give back the memory that no run uses, with a run of one image."""
        if self._bound:
            # The allocator counts the memory of a captured graph as unused.
            return
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arena)
        self._run(image, options)

    def close(self) -> None:
        """Release the session and its memory."""
        del self._session
        self._bound = None

    def _run(self, images: Images, options: ort.RunOptions | None = None) -> Outputs:
        return Outputs(*self._session.run(OUTPUT_NAMES, {self._input: images}, options))


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Input and outputs of one batch size, bound to a session."""

    images: ort.OrtValue  # [N, H, W, 3] uint8
    outputs: tuple[ort.OrtValue, ...]  # each [N, K] float32
    binding: ort.IOBinding
    options: ort.RunOptions


class BoundSession:
    """Runs batches through device buffers with fixed addresses, one set for each batch size.

    A CUDA graph replays the addresses and shapes that it was captured with, so one is captured for
    each set of buffers (ONNX Runtime's documentation of `enable_cuda_graph`). There are few sizes:
    the batcher pads to those that were warmed up. The first run of a size captures its graph.

    ONNX Runtime keeps the graphs of each thread apart: another thread than the one that warmed up
    would capture all of them again.

    Args:
        session: A session with the input and the outputs of a classifier.
        device: The session's device.
        cuda: Has the lock for captures.
    """

    def __init__(self, session: ort.InferenceSession, device: Device, cuda: CudaOptions) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._place = (device.kind, device.index)
        self._classes = session.get_outputs()[0].shape[1]
        self._by_size: dict[int, _Buffers] = {}
        self._without_graph: set[int] = set()
        self._captures = cuda.captures
        self._lock = threading.Lock()

    def run(self, images: Images) -> Outputs:
        """Run a batch `[N, H, W, 3]`; concurrent calls run one after another."""
        size = len(images)
        with self._lock:
            if size in self._by_size:
                with self._captures.replaying():
                    return self._run_bound(self._by_size[size], images)
            if size in self._without_graph:
                with self._captures.replaying():
                    return self._run_plain(images)
            with self._captures.capturing():
                return self._run_first(images)

    def _run_first(self, images: Images) -> Outputs:
        """Run the first batch of a size, which captures its graph."""
        size = len(images)
        try:
            buffers = self._bind(images)
            outputs = self._run_bound(buffers, images)
        except Exception as error:
            # What was captured so far is part of a graph. ONNX Runtime may keep it under this size
            # and would replay it, so the size does without from now on.
            self._without_graph.add(size)
            if is_out_of_memory(error):
                raise
            logger.warning("no CUDA graph", images=size, reason=" ".join(str(error).split()))
            return self._run_plain(images)
        self._by_size[size] = buffers
        return outputs

    def _run_bound(self, buffers: _Buffers, images: Images) -> Outputs:
        buffers.images.update_inplace(np.ascontiguousarray(images))
        self._session.run_with_iobinding(buffers.binding, buffers.options)
        # On a CPU numpy() is a view of the buffer, which the next batch overwrites.
        return Outputs(*(value.numpy().copy() for value in buffers.outputs))

    def _run_plain(self, images: Images) -> Outputs:
        outputs = self._session.run(OUTPUT_NAMES, {self._input: images}, _graph_options(_NO_GRAPH))
        return Outputs(*outputs)

    def _bind(self, images: Images) -> _Buffers:
        count = len(images)
        binding = self._session.io_binding()
        # Not made from the images: on a CPU the buffer would be the caller's memory.
        bound_images = self._allocate(images.shape, np.uint8)
        binding.bind_ortvalue_input(self._input, bound_images)
        outputs = []
        for name in OUTPUT_NAMES:
            value = self._allocate((count, self._classes), np.float32)
            binding.bind_ortvalue_output(name, value)
            outputs.append(value)
        return _Buffers(bound_images, tuple(outputs), binding, _graph_options(str(count)))

    def _allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._place)


def why_unusable(device: Device) -> str:
    """Return why ONNX Runtime cannot use a CUDA device at all; empty where it can."""
    _load_libraries(None)
    try:
        ort.OrtValue.ortvalue_from_shape_and_type((1,), np.uint8, device.kind, device.index)
    except Exception as error:  # onnxruntime has no common exception type
        text = " ".join(str(error).split())
        # Before and after it come functions, paths and the name of the host.
        failure = _CUDA_FAILURE.search(text)
        return f"{failure[0] if failure else text} (built for CUDA {ort.cuda_version})"
    return ""


def _graph_options(graph_id: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


def _nodes_on_cpu(session: ort.InferenceSession) -> list[tuple[str, str]]:
    return [
        (node.op_type, node.name)
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == _CPU_PROVIDER
        for node in subgraph.get_nodes()
    ]


def _tensors(declared: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            tensor.name,
            _DATATYPES.get(tensor.type, tensor.type),
            # A named axis is variable.
            tuple(size if isinstance(size, int) else -1 for size in tensor.shape),
        )
        for tensor in declared
    )


def _session_options(device: Device, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores that the event loop needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device.kind == "cuda":
        # Not `disable_cpu_ep_fallback`, which rejects nodes that compute shapes on the CPU as well.
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


Provider = tuple[str, dict[str, Any]]


def _name(provider: str | Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _providers(device: Device, options: CudaOptions) -> list[str | Provider]:
    if device.kind == "cpu":
        return [_CPU_PROVIDER]
    cuda = {
        "device_id": device.index,
        # The default search times every kernel again for each new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        # On by default: it rounds the factors of products to 10 bits, which is not float32.
        "use_tf32": int(options.tf32),
        "enable_cuda_graph": int(options.graphs),
    }
    if options.tensorrt:
        return [
            (_TENSORRT_PROVIDER, _tensorrt_options(device, options.tensorrt)),
            (_CUDA_PROVIDER, cuda),
        ]
    return [(_CUDA_PROVIDER, cuda)]


def _tensorrt_options(device: Device, wanted: TensorRt) -> dict[str, Any]:
    height, width, channels = wanted.sample_shape

    def profile(batch_size: int) -> str:
        return f"{wanted.input_name}:{batch_size}x{height}x{width}x{channels}"

    options = {
        "device_id": device.index,
        # One engine for all batch sizes; without a profile each new size would build another.
        "trt_profile_min_shapes": profile(1),
        "trt_profile_opt_shapes": profile(wanted.best_batch_size),
        "trt_profile_max_shapes": profile(wanted.max_batch_size),
        "trt_fp16_enable": int(wanted.precision == "fp16"),
        "trt_int8_enable": int(wanted.precision == "int8"),
    }
    if wanted.engines:
        options |= {
            "trt_engine_cache_enable": 1,
            "trt_engine_cache_path": str(wanted.engines),
            "trt_timing_cache_enable": 1,
            "trt_timing_cache_path": str(wanted.engines),
        }
    return options


def _load_libraries(tensorrt: TensorRt | None) -> None:
    """Load the libraries that are installed as Python packages, where a provider finds them."""
    ort.preload_dlls()
    if tensorrt:
        if tensorrt.precision != "tf32":
            # TensorRT uses TF32 for float32 by default, and the provider has no option for it.
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        # Otherwise the system's libraries are taken, if any.
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt")
