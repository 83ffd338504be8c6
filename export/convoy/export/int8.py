"""int8 for ONNX on a CPU: static quantization (QDQ, per channel) by ONNX Runtime's tool."""

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

from convoy.export.errors import UnsupportedNetError
from convoy.export.onnx_import import upgrade_for_int8
from convoy.export.servable import INPUT_NAME, Images

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
    """Write the int8 variant of a float32 graph.

    The classifier's last matrix product stays in float32: quantization would clip every logit to
    the range of the calibration.

    Args:
        float_path: The graph in float32.
        path: Where the int8 graph goes.
        calibration: Training images `[N, H, W, 3]`; they set the ranges of the activations.

    Raises:
        UnsupportedNetError: The graph has nothing to quantize.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / float_path.name
        upgraded = Path(folder) / "upgraded.onnx"
        upgraded.write_bytes(upgrade_for_int8(onnx.load(float_path)).SerializeToString())
        quant_pre_process(upgraded, prepared, skip_symbolic_shape=True)
        nodes = [node for node in onnx.load(prepared).graph.node if node.op_type in _OPERATORS]
        if len(nodes) < 2:
            raise UnsupportedNetError(f"int8: expected layers to quantize, found {len(nodes)}")
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
            # Seven bits: x86 processors without VNNI add two products in 16 bits, which 255 x 127
            # twice exceeds; the sum would be clipped there, and there alone.
            reduce_range=True,
        )
