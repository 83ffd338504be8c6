"""int8 for ONNX on a CPU: static quantization (QDQ, per channel) by ONNX Runtime's tool.

A layer is a convolution or a matrix product. Sensitive layers can stay in float32.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from convoy.export import onnx_format
from convoy.export.errors import UnsupportedNetError
from convoy.export.formats import ArtifactFormat, Precision, Variant
from convoy.export.onnx_import import upgrade_for_int8
from convoy.export.servable import INPUT_NAME, Images

VARIANT = Variant(ArtifactFormat.ONNX, Precision.INT8)
_OPERATORS = ("Conv", "Gemm", "MatMul")
_INT8_OPERATORS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger")
_CALIBRATION_BATCH = 32
_RANKING_IMAGES = 32
_FLOAT_SHARES = (1 / 4, 1 / 2)
"""Shares of the layers that stay in float32 in the last attempts."""


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), _CALIBRATION_BATCH)
        self._batches = iter([images[start : start + _CALIBRATION_BATCH] for start in starts])

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


@dataclass(frozen=True, slots=True)
class Attempt:
    """An int8 graph.

    Attributes:
        in_float: Names of the layers that stay in float32 because int8 changes the logits too much
            there; the last layer is not among them.
    """

    graph: onnx.ModelProto
    in_float: tuple[str, ...]


def count_layers(path: Path) -> tuple[int, int]:
    """Return how many layers of an ONNX file are in int8, and how many it has."""
    graph = onnx.load(path, load_external_data=False).graph
    fused = sum(node.op_type in _INT8_OPERATORS for node in graph.node)
    return len(_quantized_layers(graph)) + fused, len(_layers(graph)) + fused


def _layers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in _OPERATORS]


def _quantized_layers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return [node for node in _layers(graph) if dequantized.issuperset(node.input[:2])]


def attempts(
    float_path: Path, calibration: Images, progress: Callable[[str], None] = lambda step: None
) -> Iterator[Attempt]:
    """Yield int8 variants of a float32 graph, each with more layers in float32, at most half.

    The first has all layers in int8 except the last: quantization would clip every logit to the
    range of the calibration. In the others, the layers that change the logits most stay in float32
    too.

    Args:
        float_path: The graph in float32.
        calibration: Training images `[N, H, W, 3]`; they set the ranges of the activations.
        progress: Called with each step.

    Raises:
        UnsupportedNetError: The graph has nothing to quantize.
    """
    original, quantized = _quantize(float_path, calibration)
    yield Attempt(quantized, ())
    progress("looking for the layers that int8 changes most")
    ranked = _rank(quantized, original, calibration[:_RANKING_IMAGES])
    for share in _FLOAT_SHARES:
        # The last layer is one of them.
        in_float = tuple(ranked[: int(share * (len(ranked) + 1)) - 1])
        if in_float:
            yield Attempt(_with_float(quantized, original, in_float), in_float)


def _quantize(float_path: Path, calibration: Images) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the graph as prepared for the quantization, and the int8 graph."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, path = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        upgraded = Path(folder) / "upgraded.onnx"
        upgraded.write_bytes(upgrade_for_int8(onnx.load(float_path)).SerializeToString())
        quant_pre_process(upgraded, prepared, skip_symbolic_shape=True)
        original = onnx.load(prepared)
        _name_nodes(original.graph)
        onnx.save(original, prepared)
        layers = _layers(original.graph)
        if len(layers) < 2:
            raise UnsupportedNetError(f"int8: expected layers to quantize, found {len(layers)}")
        quantize_static(
            prepared,
            path,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_exclude=[layers[-1].name],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Seven bits: x86 processors without VNNI add two products in 16 bits, which 255 x 127
            # twice exceeds; the sum would be clipped there, and there alone.
            reduce_range=True,
            # Unlike a convolution, a matrix product of int8 can have an output in float32.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        return original, onnx.load(path)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give each node a name of its own."""
    counts = Counter(node.name for node in graph.node)
    for index, node in enumerate(graph.node):
        if not node.name or counts[node.name] > 1:
            node.name = f"{node.op_type}_{index}"


def _with_float(
    quantized: onnx.ModelProto, original: onnx.ModelProto, names: Collection[str]
) -> onnx.ModelProto:
    """Return the int8 graph with some layers as in the original graph."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    originals = {node.name: node for node in original.graph.node}
    in_int8 = {node.name for node in _quantized_layers(model.graph)} - set(names)
    rounded = _rounded_tensors(original.graph, in_int8)
    present = {tensor.name for tensor in model.graph.initializer}
    weights = {t.name: t for t in original.graph.initializer if t.name not in present}
    restored: set[str] = set()
    for node in model.graph.node:
        if node.name not in originals or node.name in in_int8:
            continue
        for index, name in enumerate(originals[node.name].input):
            if name in weights:
                # In the int8 graph the name of a bias is that of its dequantized value.
                node.input[index] = f"{name}.float32"
                restored.add(name)
            elif name not in rounded:
                node.input[index] = name
    for name in sorted(restored):
        model.graph.initializer.add().CopyFrom(weights[name])
        model.graph.initializer[-1].name = f"{name}.float32"
    _drop_unused(model.graph)
    return model


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove conversions that no node reads, and their constants."""
    outputs = {value.name for value in graph.output}
    constants: set[str] = set()
    for operator in ("DequantizeLinear", "QuantizeLinear"):
        read = outputs.union(*(node.input for node in graph.node))
        unused = [n for n in graph.node if n.op_type == operator and n.output[0] not in read]
        for node in unused:
            constants.update(node.input)
            graph.node.remove(node)
    constants.difference_update(*(node.input for node in graph.node))
    kept = [tensor for tensor in graph.initializer if tensor.name not in constants]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _rounded_tensors(graph: onnx.GraphProto, in_int8: Collection[str]) -> set[str]:
    """Return the outputs of int8 convolutions: the runtime has none with an output in float32."""
    rounded: set[str] = set()
    for node in graph.node:
        convolution = node.op_type == "Conv" and node.name in in_int8
        if convolution or (node.op_type in ("Relu", "Clip") and node.input[0] in rounded):
            rounded.update(node.output)
    return rounded


def _rank(quantized: onnx.ModelProto, original: onnx.ModelProto, images: Images) -> list[str]:
    """Return the int8 layers by how much each alone in int8 changes the logits, most first."""

    def logits(model: onnx.ModelProto) -> NDArray[np.float32]:
        return onnx_format.load(model.SerializeToString())(images).logits  # [N, K]

    exact = logits(original)
    names = [node.name for node in _quantized_layers(quantized.graph)]

    def error(name: str) -> float:
        others = [other for other in names if other != name]
        alone = _with_float(quantized, original, others)
        return float(np.square(logits(alone) - exact).mean())

    errors = {name: error(name) for name in names}
    return sorted(names, key=errors.__getitem__, reverse=True)
