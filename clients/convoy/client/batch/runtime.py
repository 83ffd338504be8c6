"""ONNX Runtime in this process; the one module of this package that imports it."""

import re
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from convoy.client.batch.decoding import Images
from convoy.client.batch.errors import EngineError
from convoy.client.batch.items import Floats
from convoy.client.cpus import usable_cpus

_CPU_PROVIDER = "CPUExecutionProvider"
_CUDA_PROVIDER = "CUDAExecutionProvider"
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
# Operators that compute shapes, indices and masks: ONNX Runtime keeps these on the CPU, next to the
# shapes, on purpose. For floating point all of them have CUDA kernels.
SHAPE_OPERATORS = frozenset((
    "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten",
    "Gather", "GatherND", "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not",
    "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub",
    "Tile", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
_FATAL = 4
_MOST_INSTANCES = 4


class OnnxModel:
    """An ONNX graph with input `image` and outputs `logits`, `probabilities` and perhaps others.

    Args:
        graph: The file's bytes.
        device: "cpu", "cuda" or "cuda:INDEX".
        threads: For one batch on a CPU; 0 for all processors this process may use.

    Attributes:
        outputs: The names of the graph's outputs.
        instances: How many batches are best run at once.

    Raises:
        EngineError: The device cannot be used; there is no fallback.
    """

    def __init__(self, graph: bytes, device: str, threads: int) -> None:
        if not _DEVICE.fullmatch(device):
            raise EngineError(f"--device: expected cpu, cuda or cuda:INDEX, got {device!r}")
        kind, _, index = device.partition(":")
        wanted = _CUDA_PROVIDER if kind == "cuda" else _CPU_PROVIDER
        if wanted not in ort.get_available_providers():
            raise EngineError(f"--device {device}: this build of ONNX Runtime has no {wanted}")
        threads, self.instances = _split(kind, threads)
        # Its log would repeat on many lines what our error says on one.
        ort.set_default_logger_severity(_FATAL)
        if kind == "cuda":
            # Finds the CUDA libraries that came as Python packages.
            ort.preload_dlls()
        try:
            self._session = ort.InferenceSession(
                graph, _options(kind, threads), providers=_providers(kind, index)
            )
        except Exception as error:
            # onnxruntime has no common exception type, and writes its reasons over many lines.
            raise EngineError(
                f"--device {device}: ONNX Runtime cannot run the model there: {error}"
            ) from error
        # A failed provider does not raise: the session silently uses another one.
        found = self._session.get_providers()[0]
        if found != wanted:
            raise EngineError(f"--device {device}: expected {wanted}, ONNX Runtime took {found}")
        if kind == "cuda":
            _check_placement(self._session, device)
        self._input = self._session.get_inputs()[0].name
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, images: Images, outputs: Sequence[str]) -> list[Floats]:
        """Run a batch `[N, H, W, 3]`; return these outputs `[N, D]`."""
        found: list[Floats] = self._session.run(list(outputs), {self._input: images})
        return found


def _check_placement(session: Any, device: str) -> None:
    """Check that what runs on the CPU beside a GPU computes shapes only."""
    misplaced = {
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == _CPU_PROVIDER
        for node in subgraph.get_nodes()
    } - SHAPE_OPERATORS
    if misplaced:
        raise EngineError(
            f"--device {device}: expected only nodes that compute shapes on the CPU beside CUDA, "
            f"found {', '.join(sorted(misplaced))}"
        )


def _split(kind: str, threads: int) -> tuple[int, int]:
    """Return the threads of a run, and how many runs there are at once.

    Threads of one run wait for each other at every layer, also for one whose processor decodes
    images at that time; runs do not. Each run needs memory for its own activations.
    """
    if threads or kind == "cuda":
        return threads or 1, 1
    cpus = usable_cpus()
    instances = min(cpus, _MOST_INSTANCES)
    return cpus // instances, instances


def _options(kind: str, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would burn the cores that decode the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _FATAL
    if kind == "cuda":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _providers(kind: str, index: str) -> list[str | tuple[str, dict[str, Any]]]:
    if kind == "cpu":
        return [_CPU_PROVIDER]
    cuda = {
        "device_id": int(index or 0),
        # The default search times every kernel again for each new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        # On by default: it rounds the factors of products to 10 bits, which is not float32.
        "use_tf32": 0,
    }
    return [(_CUDA_PROVIDER, cuda)]
