"""A user's own ONNX classifier, admitted behind the same input, outputs and proof as ours."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export.errors import InputError, UnsupportedNetError, one_line
from export.servable import INPUT_NAME, Outputs
from export.source import ModelSource
from training.checkpoints import DataDescription
from training.data import Preprocessing

_STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
_PREFIX = "imported_"


class OnnxNet(nn.Module):
    """Runs an ONNX graph where a net is expected: normalised `[N, 3, H, W]` to logits `[N, K]`.

    It is the reference of the proof, so it runs the graph exactly as it came.
    """

    def __init__(self, graph: onnx.ModelProto) -> None:
        super().__init__()
        self.graph = graph
        self._session = ort.InferenceSession(
            graph.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        weights = (
            tensor for tensor in graph.graph.initializer if tensor.data_type == TensorProto.FLOAT
        )
        for index, tensor in enumerate(weights):
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            self.register_parameter(f"weight_{index}", nn.Parameter(value, requires_grad=False))

    def forward(self, pixels: Tensor) -> Tensor:
        """Runs the graph on the CPU."""
        name = self._session.get_inputs()[0].name
        (logits,) = self._session.run(None, {name: pixels.numpy()})
        return torch.from_numpy(logits)


def from_onnx(path: Path, data: DataDescription) -> ModelSource:
    """Reads a classifier that takes normalised float32 `[N, 3, H, W]` and answers logits `[N, K]`.

    Args:
        path: One file; weights outside it are refused, they could be any file of the machine.
        data: Classes, normalisation and preprocessing; the size must be the graph's.

    Raises:
        InputError: The file is not valid ONNX, reaches outside itself, uses operators that are not
            ONNX's own, or has other inputs and outputs.
    """
    try:
        content = path.read_bytes()
        graph = onnx.load_model_from_string(content)
        _check_self_contained(graph)
        onnx.checker.check_model(graph, full_check=True)
        _check_interface(graph, data)
        net = OnnxNet(graph).eval()
    # What is thrown at a foreign file depends on how it is broken, and on the library.
    except Exception as error:
        raise InputError(f"{path.name}: {one_line(error)}") from error
    digest = hashlib.sha256(content).hexdigest()
    return ModelSource(net, data, 1.0, digest, "onnx", {}, accuracy={})


def image_size_px(path: Path) -> tuple[int, int]:
    """Returns the height and width that a graph takes.

    Raises:
        InputError: The file cannot be read, or its first input has no fixed height and width.
    """
    try:
        value = onnx.load(path, load_external_data=False).graph.input[0]
        _, _, height_px, width_px = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
    except Exception as error:
        raise InputError(f"{path.name}: expected an ONNX file that takes [N, 3, H, W]") from error
    return height_px, width_px


def wrap(graph: onnx.ModelProto, data: DataDescription, temperature: float) -> onnx.ModelProto:
    """Puts the normalisation before a graph and the softmax behind it.

    Raises:
        UnsupportedNetError: The parts do not fit together.
    """
    inner = onnx.compose.add_prefix(graph, _PREFIX)
    # Merging wants equal versions; a graph has no need of a later one than its own.
    versions = {"opset_imports": inner.opset_import, "ir_version": inner.ir_version}
    before = helper.make_model(_normalising_graph(data), **versions)
    after = helper.make_model(_softmax_graph(len(data.classes), temperature), **versions)
    try:
        joined = onnx.compose.merge_models(before, inner, [("pixels", inner.graph.input[0].name)])
        return onnx.compose.merge_models(joined, after, [(inner.graph.output[0].name, "raw")])
    except (ValueError, onnx.checker.ValidationError) as error:
        raise UnsupportedNetError(f"the graph cannot be wrapped: {one_line(error)}") from error


def _check_self_contained(graph: onnx.ModelProto) -> None:
    for tensor in _tensors(graph.graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(
                f"expected all weights in the file, {tensor.name!r} is kept outside it"
            )
    domains = {entry.domain for entry in graph.opset_import}
    domains |= {function.domain for function in graph.functions}
    if foreign := sorted(domains - _STANDARD_DOMAINS):
        raise InputError(f"expected ONNX's own operators only, found the domain {foreign[0]!r}")


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Yields every constant of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _check_interface(graph: onnx.ModelProto, data: DataDescription) -> None:
    size = data.preprocessing
    known = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in known]
    _check_value(inputs, "input", [3, size.height_px, size.width_px])
    _check_value(graph.graph.output, "output", [len(data.classes)])


def _check_value(values: Sequence[onnx.ValueInfoProto], role: str, shape: list[int]) -> None:
    if len(values) != 1:
        raise InputError(f"expected one {role}, found {len(values)}")
    kind = values[0].type.tensor_type
    found = [dim.dim_value or dim.dim_param for dim in kind.shape.dim]
    free = bool(found) and not isinstance(found[0], int)
    if kind.elem_type != TensorProto.FLOAT or not free or found[1:] != shape:
        raise InputError(
            f"{role} {values[0].name!r}: expected float32 {['N', *shape]} with a free first axis, "
            f"got {TensorProto.DataType.Name(kind.elem_type)} {found}"
        )


def _normalising_graph(data: DataDescription) -> onnx.GraphProto:
    size: Preprocessing = data.preprocessing
    mean, std = (np.array(v, np.float64).reshape(1, 3, 1, 1) for v in (data.mean, data.std))
    constants = {"scale": 1 / (255 * std), "shift": -mean / std}
    return helper.make_graph(
        [
            helper.make_node("Transpose", [INPUT_NAME], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["pixels"]),
        ],
        "normalisation",
        [
            helper.make_tensor_value_info(
                INPUT_NAME, TensorProto.UINT8, ["batch", size.height_px, size.width_px, 3]
            )
        ],
        [
            helper.make_tensor_value_info(
                "pixels", TensorProto.FLOAT, ["batch", 3, size.height_px, size.width_px]
            )
        ],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )


def _softmax_graph(classes: int, temperature: float) -> onnx.GraphProto:
    logits, probabilities = Outputs._fields
    shape: list[str | int | None] = ["batch", classes]
    return helper.make_graph(
        [
            helper.make_node("Identity", ["raw"], [logits]),
            helper.make_node("Div", ["raw", "temperature"], ["calibrated"]),
            helper.make_node("Softmax", ["calibrated"], [probabilities], axis=1),
        ],
        "softmax",
        [helper.make_tensor_value_info("raw", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name in (logits, probabilities)
        ],
        [numpy_helper.from_array(np.array(temperature, np.float32), "temperature")],
    )
