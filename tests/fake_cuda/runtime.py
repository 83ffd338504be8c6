"""A double of the module `onnxruntime` whose sessions behave as on CUDA and compute on the CPU.

From ONNX Runtime's source: graphs are kept apart by thread and by `gpu_graph_id`; the first run of
an id runs, captures and replays; a replay reads and writes the addresses of the capture, whatever
is bound; a capture in CUDA's global mode forbids allocations and copies of other threads, and what
a failed run captured so far is kept under its id.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

# As ONNX Runtime words it.
ARENA_FULL = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv "
    "node. BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 42"
)
NOT_WHILE_CAPTURING = (
    "CUDA failure 900: operation not permitted when stream is capturing ; GPU=0 ; expr=cudaMalloc"
)


@dataclass
class FakeCuda:
    """The device, and stands in for the module.

    Attributes:
        memory_images: The largest batch that fits.
        arena_images: The batch that the arena has grown to since it was shrunk.
        error: Added to every logit.
        on_cpu: Whether a node, by operator and name, runs on the CPU: for want of a kernel, or
            because it computes a shape.
        fail_capture: Called with the size before a capture ends; may raise.
        captures: `(thread, size)` of every capture.
        replays: How many there were.
        violations: What was done during a capture of another thread.
        sessions: All sessions.
    """

    memory_images: int = 1 << 30
    arena_images: int = 0
    error: float = 0.0
    on_cpu: Callable[[str, str], bool] = lambda operator, name: False
    fail_capture: Callable[[int], None] = lambda size: None
    captures: list[tuple[int, int]] = field(default_factory=list)
    replays: int = 0
    violations: list[str] = field(default_factory=list)
    sessions: list["FakeSession"] = field(default_factory=list)
    capturing: int = 0

    SessionOptions = ort.SessionOptions
    RunOptions = ort.RunOptions
    cuda_version = "13.0"

    def __post_init__(self) -> None:
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self.allocate)

    def preload_dlls(self) -> None:
        pass

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def set_default_logger_severity(self, level: int) -> None:
        pass

    def InferenceSession(
        self, content: bytes, options: ort.SessionOptions, providers: list[Any]
    ) -> "FakeSession":
        self.sessions.append(FakeSession(self, content, options, dict(providers)))
        return self.sessions[-1]

    def allocate(self, shape: Iterable[int], dtype: Any, kind: str, index: int) -> "FakeValue":
        self.touch("allocation")
        return FakeValue(self, np.empty(tuple(shape), dtype))

    def touch(self, what: str) -> None:
        if self.capturing not in {0, threading.get_ident()}:
            self.violations.append(what)
            raise RuntimeError(NOT_WHILE_CAPTURING)

    def take_memory(self, images: int) -> None:
        self.arena_images = max(self.arena_images, images)
        if images > self.memory_images:
            raise RuntimeError(ARENA_FULL)


class FakeValue:
    """A tensor on the device."""

    def __init__(self, cuda: FakeCuda, memory: np.ndarray) -> None:
        self._cuda = cuda
        self.memory = memory

    def update_inplace(self, host: np.ndarray) -> None:
        self._cuda.touch("copy")
        self.memory[:] = host

    def numpy(self) -> np.ndarray:
        self._cuda.touch("copy")
        return self.memory.copy()


class FakeBinding:
    def __init__(self) -> None:
        self.input: FakeValue
        self.outputs: list[FakeValue] = []

    def bind_ortvalue_input(self, name: str, value: FakeValue) -> None:
        self.input = value

    def bind_ortvalue_output(self, name: str, value: FakeValue) -> None:
        self.outputs.append(value)


class FakeSession:
    def __init__(
        self,
        cuda: FakeCuda,
        content: bytes,
        options: ort.SessionOptions,
        providers: dict[str, dict[str, Any]],
    ) -> None:
        options.log_severity_level = 4
        self._real = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._cuda = cuda
        self.providers = providers
        # None where the capture failed half-way.
        self._graphs: dict[tuple[int, int], FakeBinding | None] = {}
        if tensorrt := providers.get("TensorrtExecutionProvider"):
            build_engine(tensorrt)

    def get_providers(self) -> list[str]:
        return [*self.providers, "CPUExecutionProvider"]

    def get_inputs(self) -> list[Any]:
        return self._real.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self._real.get_outputs()

    def disable_fallback(self) -> None:
        pass

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        """The nodes of the real session, on the devices that `on_cpu` tells."""
        by_provider: dict[str, list[Any]] = {}
        for subgraph in self._real.get_provider_graph_assignment_info():
            for node in subgraph.get_nodes():
                beside = self._cuda.on_cpu(node.op_type, node.name)
                name = "CPUExecutionProvider" if beside else next(iter(self.providers))
                by_provider.setdefault(name, []).append(node)
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes)
            for name, nodes in by_provider.items()
        ]

    def run(
        self,
        names: Iterable[str],
        feed: dict[str, np.ndarray],
        options: ort.RunOptions | None = None,
    ) -> list[np.ndarray]:
        graphs = self.providers["CUDAExecutionProvider"].get("enable_cuda_graph")
        assert not graphs or entry(options, "gpu_graph_id") == "-1", "captures passing addresses"
        (images,) = feed.values()
        self._cuda.touch("copy")
        outputs = self._compute(images)
        if entry(options, "memory.enable_memory_arena_shrinkage") == "gpu:0":
            self._cuda.arena_images = 0
        return outputs

    def run_with_iobinding(self, binding: FakeBinding, options: ort.RunOptions) -> None:
        graph = threading.get_ident(), int(entry(options, "gpu_graph_id"))
        if graph not in self._graphs:
            self._store(self._compute(binding.input.memory), binding)
            self._capture(graph, binding)
        captured = self._graphs[graph]
        if captured is None:
            # Part of a graph leaves in the outputs what was there.
            return
        self._cuda.replays += 1
        self._store(self._compute(captured.input.memory), captured)

    def _capture(self, graph: tuple[int, int], binding: FakeBinding) -> None:
        self._cuda.touch("capture")
        self._cuda.capturing = graph[0]
        self._graphs[graph] = None
        try:
            self._cuda.fail_capture(graph[1])
        finally:
            self._cuda.capturing = 0
        self._graphs[graph] = binding
        self._cuda.captures.append(graph)

    def _compute(self, images: np.ndarray) -> list[np.ndarray]:
        self._cuda.take_memory(len(images))
        logits, probabilities = self._real.run(["logits", "probabilities"], {"image": images})
        return [logits + np.float32(self._cuda.error), probabilities]

    def _store(self, outputs: list[np.ndarray], binding: FakeBinding) -> None:
        for value, output in zip(binding.outputs, outputs, strict=True):
            value.memory[:] = output


def build_engine(options: dict[str, Any]) -> None:
    """Write an engine where TensorRT would, unless there is one."""
    if not options.get("trt_engine_cache_enable"):
        return
    engine = Path(options["trt_engine_cache_path"]) / "graph_sm90.engine"
    if not engine.exists():
        engine.write_text(options["trt_profile_max_shapes"])


def entry(options: ort.RunOptions | None, name: str) -> str:
    """Return an entry of the run options; empty without it."""
    if options is None:
        return ""
    try:
        return str(options.get_run_config_entry(name))
    except RuntimeError:
        return ""
