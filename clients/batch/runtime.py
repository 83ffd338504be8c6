"""ONNX Runtime in this process; the one module of this package that imports it."""

import re
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from clients.batch.decoding import Images
from clients.batch.errors import EngineError
from clients.batch.processors import usable_cpus

_CPU_PROVIDER = "CPUExecutionProvider"
_CUDA_PROVIDER = "CUDAExecutionProvider"
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_FATAL = 4

Floats = NDArray[np.float32]


class OnnxModel:
    """An ONNX graph with input `image` and outputs `logits`, `probabilities`.

    Args:
        graph: The file's bytes.
        device: "cpu", "cuda" or "cuda:INDEX".
        threads: For one batch on a CPU; 0 for all processors this process may use.

    Raises:
        EngineError: The device cannot be used. Nothing falls back to another one.
    """

    def __init__(self, graph: bytes, device: str, threads: int) -> None:
        if not _DEVICE.fullmatch(device):
            raise EngineError(f"--device: expected cpu, cuda or cuda:INDEX, got {device!r}")
        kind, _, index = device.partition(":")
        wanted = _CUDA_PROVIDER if kind == "cuda" else _CPU_PROVIDER
        if wanted not in ort.get_available_providers():
            raise EngineError(f"--device {device}: this build of ONNX Runtime has no {wanted}")
        # Its log would say on many lines what an error of ours says on one.
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
        # A failed provider does not raise: the session silently holds another one.
        found = self._session.get_providers()[0]
        if found != wanted:
            raise EngineError(f"--device {device}: expected {wanted}, ONNX Runtime took {found}")
        self._input = self._session.get_inputs()[0].name

    def run(self, images: Images) -> tuple[Floats, Floats]:
        """Runs a batch `[N, H, W, 3]`; returns logits and probabilities `[N, K]`."""
        logits, probabilities = self._session.run(
            ["logits", "probabilities"], {self._input: images}
        )
        return logits, probabilities


def _options(kind: str, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    # Spinning threads would burn the cores that decode the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _FATAL
    if kind == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _providers(kind: str, index: str) -> list[str | tuple[str, dict[str, Any]]]:
    if kind == "cpu":
        return [_CPU_PROVIDER]
    cuda = {
        "device_id": int(index or 0),
        # The default search times every kernel again for each new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [(_CUDA_PROVIDER, cuda)]
