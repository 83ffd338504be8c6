"""int8 for ONNX on a CPU: static quantization (QDQ, per channel) by ONNX Runtime's own tool."""

import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.errors import UnsupportedNetError
from export.servable import INPUT_NAME, Images

_OPERATORS = ("Conv", "Gemm", "MatMul")
_CALIBRATION_BATCH = 32


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), _CALIBRATION_BATCH)
        self._batches = iter([images[start : start + _CALIBRATION_BATCH] for start in starts])

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def quantize(float_path: Path, path: Path, calibration: Images) -> None:
    """Writes the int8 variant of a float32 graph.

    The classifier's last product stays in float32: quantised, it would clip every logit to the
    range seen in calibration.

    Args:
        float_path: The graph in float32.
        path: Where the int8 graph goes.
        calibration: Training images `[N, H, W, 3]`; they set the ranges of the activations.

    Raises:
        UnsupportedNetError: The graph has nothing to quantise.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / float_path.name
        quant_pre_process(float_path, prepared, skip_symbolic_shape=True)
        nodes = [node for node in onnx.load(prepared).graph.node if node.op_type in _OPERATORS]
        if len(nodes) < 2:
            raise UnsupportedNetError(f"int8: expected layers to quantise, found {len(nodes)}")
        quantize_static(
            prepared,
            path,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_exclude=[nodes[-1].name],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
