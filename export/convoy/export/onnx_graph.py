"""ONNX graphs of other tools: how they are read and prepared for wrapping.

`read_graph` turns a classifier's file into a graph with one float32 or float16 input
`[batch, …]`, one output of scores, no model-local function and no unused operator set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

from convoy.export.errors import InputError, one_line
from convoy.export.formats import Layout, OutputKind, Precision

BATCH_AXIS = "batch"
MAX_FILE_BYTES = 2**31 - 1
"""What protobuf, and so ONNX, can hold in one file."""
_WRAPPING_BYTES = 1 << 20
"""Room for the nodes that the export adds."""
OLDEST_OPSET = 7
"""The first opset whose operators broadcast."""
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Operator domains that ONNX Runtime implements; a server rejects a node of any other.

A test compares them with the server's rule in convoy.server.backends.onnx_check.
"""
OUTSIDE_OPERATORS = frozenset({("com.microsoft", "EPContext")})
"""Operators that refer to another file."""
_INPUT_TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
_OUTPUT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
# Operators that do not change the order of the scores.
_PASSING = frozenset(
    {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "ZipMap"}
)
_INT8_OPERATORS = frozenset(
    {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Information that a file does not contain.

    Attributes:
        image_size_px: Height and width, for a graph with free ones.
        layout: Of the input; None detects it from the shape or by a trial.
        output_name: Of the output with the scores; required if several qualify.
    """

    image_size_px: tuple[int, int] | None = None
    layout: Layout | None = None
    output_name: str | None = None


@dataclass(frozen=True, slots=True)
class ForeignGraph:
    """A classifier's graph.

    Attributes:
        original: The unchanged graph with its external data; the reference runs it.
        model: With a free batch axis, one output, no functions and no unused operator sets.
        input_name: Of the images.
        output_name: Of the scores `[batch, K]` or `[batch, K, 1, 1]`.
        layout: Of the input.
        channels: 3, or 1 of a gray net.
        height_px, width_px: Of the input.
        half: Whether the input is float16.
        fixed_batch: Fixed batch size of the original; None if it is free.
        precision: Of the weights inside.
        ends_in: The last operator, if it is a softmax or a sigmoid.
        multiply_adds: Of one image.
    """

    original: bytes
    model: ModelProto
    input_name: str
    output_name: str
    layout: Layout
    channels: int
    height_px: int
    width_px: int
    half: bool
    fixed_batch: int | None
    precision: Precision
    ends_in: OutputKind | None
    multiply_adds: int


def read_graph(path: Path, options: ReadOptions) -> ForeignGraph:
    """Read a classifier's ONNX file.

    Args:
        path: The file; external data is read from its folder into the graph.
        options: Information that the file does not contain.

    Raises:
        InputError: The file is not valid ONNX, refers to files outside its folder, uses operators
            that servers reject, or is not an image classifier; the message names the node or
            value.
    """
    model = _load(path)
    original = model.SerializeToString()
    _check_operators(model)
    model = _inline_functions(model)
    _drop_unused_domains(model)
    _drop_initializer_inputs(model.graph)
    zip_map = _take_off_zip_map(model.graph)
    image = _image_input(model.graph)
    output_name = zip_map or _choose_output(model.graph, options.output_name)
    layout, channels, height_px, width_px = _layout_and_size(model, image, options)
    axes = (channels, height_px, width_px)
    fixed_batch = _free_batch_axis(
        model, image, axes if layout is Layout.NCHW else (*axes[1:], channels)
    )
    _keep_output(model, output_name)
    inferred = _infer_shapes(model)
    return ForeignGraph(
        original=original,
        model=model,
        input_name=image.name,
        output_name=output_name,
        layout=layout,
        channels=channels,
        height_px=height_px,
        width_px=width_px,
        half=image.type.tensor_type.elem_type == TensorProto.FLOAT16,
        fixed_batch=fixed_batch,
        precision=_precision(model.graph),
        ends_in=_final_activation(model.graph, output_name),
        multiply_adds=_multiply_adds(inferred.graph),
    )


def baked_reshapes(model: ModelProto, batch: int | None = None) -> list[NodeProto]:
    """Return the Reshape nodes whose constant shape fixes the batch axis.

    Args:
        model: Its free batch axes are named BATCH_AXIS.
        batch: The size to find; None finds every fixed size.
    """
    graph = _infer_shapes(model).graph
    constants, shapes = _constants(graph), _shapes(graph)
    found = []
    for node in graph.node:
        if node.op_type != "Reshape" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        target = constants[node.input[1]].flatten().tolist()
        keeps_batch = shapes.get(node.input[0], [])[:1] == [batch or BATCH_AXIS]
        if keeps_batch and target and target[0] == (batch or max(1, target[0])):
            found.append(node)
    return found


def _load(path: Path) -> ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
        _check_external_size(path, model)
        onnx.load_external_data_for_model(model, str(path.parent))
    except InputError:
        raise
    # The exception for a damaged file depends on the damage and on the library.
    except Exception as error:
        raise InputError(f"{path.name}: expected an ONNX file: {one_line(error)}") from error
    if not model.HasField("graph") or not model.graph.node:
        raise InputError(f"{path.name}: expected an ONNX file, found no graph in it")
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(
                f"{path.name}: tensor {tensor.name!r}: expected its external data next to the file"
            )
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise InputError(
            f"{path.name}: expected operator set {OLDEST_OPSET} or newer, got {opset}; convert it "
            "with onnx.version_converter"
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise InputError(f"{path.name} is not valid ONNX: {one_line(error)}") from error
    return model


def _check_external_size(path: Path, model: ModelProto) -> None:
    """Raise for weights that do not fit into one file, before reading any into memory.

    Raises:
        InputError: It does not fit.
    """
    size_bytes = model.ByteSize()
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            size_bytes += _external_bytes(path.parent, tensor)
    room = MAX_FILE_BYTES - _WRAPPING_BYTES
    if size_bytes > room:
        raise InputError(
            f"{path.name}: expected at most {room} bytes with its external data, the limit of "
            f"one ONNX file, got {size_bytes}"
        )


def _external_bytes(folder: Path, tensor: TensorProto) -> int:
    """Return the bytes that a tensor uses of its file; without a length, the whole file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.get("length", "").isdecimal():
        return int(entries["length"])
    file = folder / entries.get("location", "")
    return file.stat().st_size if file.is_file() else 0


def _check_operators(model: ModelProto) -> None:
    own = {function.domain for function in model.functions}
    graphs: list[GraphProto | FunctionProto] = [model.graph, *model.functions]
    for node in (node for graph in graphs for node in _nodes(graph)):
        outside = (node.domain, node.op_type) in OUTSIDE_OPERATORS
        if outside or node.domain not in KNOWN_DOMAINS | own:
            raise InputError(
                f"node {node.name!r}: expected operators of ONNX and ONNX Runtime, found "
                f"{node.op_type!r} of the domain {node.domain!r}"
            )


def _inline_functions(model: ModelProto) -> ModelProto:
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise InputError(f"the model's functions cannot be inlined: {one_line(error)}") from error


def _drop_unused_domains(model: ModelProto) -> None:
    """Keep one operator set for each domain in use; ONNX Runtime's optimizer lists many others."""
    used = {node.domain.removeprefix("ai.onnx") or "" for node in _nodes(model.graph)} | {""}
    kept: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if domain.removeprefix("ai.onnx") in used or domain in used:
            kept.setdefault(domain, entry.version)
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in kept.items())


def _drop_initializer_inputs(graph: GraphProto) -> None:
    """Remove the weights from the inputs, where old versions of ONNX list them."""
    weights = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(kept)


def _take_off_zip_map(graph: GraphProto) -> str | None:
    """Remove a ZipMap, which turns scores into dictionaries; return the name of the scores."""
    for node in graph.node:
        if node.op_type == "ZipMap":
            scores: str = node.input[0]
            graph.output.remove(next(v for v in graph.output if v.name == node.output[0]))
            graph.node.remove(node)
            return scores
    return None


def _image_input(graph: GraphProto) -> ValueInfoProto:
    if len(graph.input) != 1:
        names = [value.name for value in graph.input]
        raise InputError(f"input: expected one, found {len(names)}: {names}")
    value = graph.input[0]
    kind = value.type.tensor_type
    if kind.elem_type not in _INPUT_TYPES or len(kind.shape.dim) != 4:
        raise InputError(
            f"input {value.name!r}: expected float32 or float16 of 4 axes, got "
            f"{_type_name(kind.elem_type)} {_dims(value)}"
        )
    return value


def _choose_output(graph: GraphProto, wanted: str | None) -> str:
    outputs = {value.name: value for value in graph.output}
    listed = ", ".join(f"{name!r} {_dims(value)}" for name, value in outputs.items())
    if wanted is not None:
        if wanted not in outputs:
            raise InputError(f"output_name: expected one of {listed}, got {wanted!r}")
        return wanted
    able = [name for name, value in outputs.items() if _is_score_shaped(value)]
    if len(able) != 1:
        count = "none" if not able else f"{len(able)}"
        raise InputError(
            f"outputs: expected one of float [N, K] or [N, K, 1, 1], found {count} of {listed}"
            + ("; choose with --output-name" if able else "")
        )
    return able[0]


def _is_score_shaped(value: ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    dims = _dims(value)
    return kind.elem_type in _OUTPUT_TYPES and (
        len(dims) == 2 or (len(dims) == 4 and dims[2:] == [1, 1])
    )


def _layout_and_size(
    model: ModelProto, image: ValueInfoProto, options: ReadOptions
) -> tuple[Layout, int, int, int]:
    """Find the axes of channels, height and width, and their lengths.

    Raises:
        InputError: The shape fits no layout, or a flag for the size is missing.
    """
    dims = _dims(image)
    layout = options.layout or _layout_of(dims)
    if layout is None:
        # Both ends are free or 3: the first convolution's weights decide.
        layout = Layout.NHWC if _transposes_first(model.graph, image.name) else Layout.NCHW
    axes = (2, 3) if layout is Layout.NCHW else (1, 2)
    channels = dims[1 if layout is Layout.NCHW else 3]
    if isinstance(channels, int) and channels not in (0, 1, 3):
        raise InputError(
            f"input {image.name!r}: expected 3 channels, or 1 of gray, got {channels} in {dims}"
        )
    sides = [dims[axis] for axis in axes]
    height_px, width_px = (side if isinstance(side, int) else 0 for side in sides)
    if options.image_size_px:
        asked = options.image_size_px
        if any(
            side not in (0, want) for side, want in zip((height_px, width_px), asked, strict=True)
        ):
            raise InputError(
                f"image_size_px: the graph takes {height_px} x {width_px}, got "
                f"{asked[0]} x {asked[1]}"
            )
        height_px, width_px = asked
    if not height_px or not width_px:
        raise InputError(
            f"input {image.name!r}: its height and width are free, {dims}; give --image-size-px"
        )
    return layout, 1 if channels == 1 else 3, height_px, width_px


def _layout_of(dims: list[int | str]) -> Layout | None:
    for channels in (3, 1):
        ends = (dims[1] == channels, dims[3] == channels)
        if ends == (True, False):
            return Layout.NCHW
        if ends == (False, True):
            return Layout.NHWC
    # Neither axis fits a number of channels: a fixed last axis is a width.
    if not {dims[1], dims[3]} & {1, 3} and isinstance(dims[3], int) and dims[3]:
        return Layout.NCHW
    return None


def _transposes_first(graph: GraphProto, name: str) -> bool:
    """Return whether the input goes into a Transpose from NHWC to NCHW, perhaps after a Cast."""
    for node in graph.node:
        if name in node.input:
            if node.op_type == "Transpose":
                perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
                return perm == [0, 3, 1, 2]
            if node.op_type in ("Cast", "Identity"):
                return _transposes_first(graph, node.output[0])
    return False


def _free_batch_axis(
    model: ModelProto, image: ValueInfoProto, shape: tuple[int, int, int]
) -> int | None:
    """Name the batch axis, fix the other axes, and return the fixed batch size, if any."""
    dims = image.type.tensor_type.shape.dim
    fixed = dims[0].dim_value or None
    if fixed:
        _release_reshapes(model, fixed)
    for dim, length in zip(list(dims)[1:], shape, strict=True):
        dim.Clear()
        dim.dim_value = length
    dims[0].Clear()
    dims[0].dim_param = BATCH_AXIS
    # Recorded shapes are those of the fixed batch.
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_param = BATCH_AXIS
    return fixed


def _release_reshapes(model: ModelProto, batch: int) -> None:
    """Let constant Reshape targets that begin with the fixed batch copy the batch axis instead."""
    nodes = {node.output[0]: node for node in model.graph.node}
    for index, found in enumerate(baked_reshapes(model, batch)):
        node = nodes[found.output[0]]
        target = _constants(model.graph)[node.input[1]].flatten().copy()
        target[0] = 0
        name = f"convoy_free_shape_{index}"
        model.graph.initializer.append(numpy_helper.from_array(target, name))
        node.input[1] = name


def _keep_output(model: ModelProto, name: str) -> None:
    """Remove all outputs but one, and keep its type."""
    graph = model.graph
    values = [value for value in graph.output if value.name == name]
    if not values:
        inferred = _infer_shapes(model).graph
        values = [value for value in inferred.value_info if value.name == name]
    if not values:
        raise InputError(f"output {name!r}: expected scores of a known type, found none")
    kept = ValueInfoProto()
    kept.CopyFrom(values[0])
    if kept.type.tensor_type.elem_type not in _OUTPUT_TYPES:
        kind = _type_name(kept.type.tensor_type.elem_type)
        raise InputError(f"output {name!r}: expected float32 or float16, got {kind}")
    del graph.output[:]
    graph.output.append(kept)


def _final_activation(graph: GraphProto, name: str) -> OutputKind | None:
    """Return the last operator if it is a softmax or a sigmoid."""
    makers: dict[str, NodeProto] = {out: node for node in graph.node for out in node.output}
    node = makers.get(name)
    while node is not None and node.op_type in _PASSING:
        node = makers.get(node.input[0])
    if node is None:
        return None
    if node.op_type == "Softmax":
        return OutputKind.PROBABILITIES
    if node.op_type in ("Sigmoid", "HardSigmoid"):
        return OutputKind.SIGMOID
    return None


def _precision(graph: GraphProto) -> Precision:
    """Return the number format of the graph's weights and arithmetic."""
    if any(node.op_type in _INT8_OPERATORS for node in _nodes(graph)):
        return Precision.INT8
    single, half = (
        sum(int(np.prod(tensor.dims)) for tensor in _tensors(graph) if tensor.data_type == kind)
        for kind in (TensorProto.FLOAT, TensorProto.FLOAT16)
    )
    return Precision.FP16 if half > single else Precision.FP32


def _multiply_adds(graph: GraphProto) -> int:
    """Count the multiply-adds of convolutions and matrix products with known shapes per image."""
    shapes = _shapes(graph)
    total = 0
    for node in graph.node:
        weight = shapes.get(node.input[1], []) if len(node.input) > 1 else []
        sides = [size for size in weight if isinstance(size, int)]
        if not weight or len(sides) != len(weight):
            continue
        # The batch axis counts as one image, an unknown one likewise.
        output = shapes.get(node.output[0], [])
        elements = int(np.prod([size if isinstance(size, int) and size else 1 for size in output]))
        match node.op_type:
            case "Conv":
                total += elements * int(np.prod(sides[1:]))
            case "Gemm" | "MatMul" if len(weight) >= 2:
                transposed = any(a.name == "transB" and a.i for a in node.attribute)
                total += elements * sides[-1] if transposed else sides[-2]
    return total


def _infer_shapes(model: ModelProto) -> ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"the graph's shapes contradict each other: {one_line(error)}") from error


def _shapes(graph: GraphProto) -> dict[str, list[int | str]]:
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: _dims(value) for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    return shapes


def _constants(graph: GraphProto) -> dict[str, np.ndarray]:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                found[node.output[0]] = numpy_helper.to_array(attribute.t)
    return found


def _nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yield every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield every constant of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _dims(value: ValueInfoProto) -> list[int | str]:
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _type_name(kind: int) -> str:
    name: str = TensorProto.DataType.Name(kind)
    return name.lower()
