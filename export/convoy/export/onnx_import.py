"""An imported ONNX classifier with the same input, outputs and proof as an exported net."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convoy.export.errors import InputError, UnsupportedNetError, one_line, runtime_reason
from convoy.export.formats import LUMA, ArtifactFormat, ChannelOrder, Layout, OutputKind
from convoy.export.onnx_graph import BATCH_AXIS, ForeignGraph, baked_reshapes
from convoy.export.servable import INPUT_NAME, LEAST_PROBABILITY, Outputs
from convoy.export.source import ModelSource, digest_of_file
from convoy.training.checkpoints import DataDescription

_PREFIX = "imported_"
_OURS = "convoy_"
_LOG_FATAL = 4
_TRIAL_BATCHES = (1, 3)
_NEWEST_OPSET_FOR_INT8 = 17
_LEAST_OPSET_FOR_INT8 = 13


class OnnxNet(nn.Module):
    """Runs an ONNX graph where a net is expected: normalized `[N, C, H, W]` to scores `[N, K]`.

    It is the reference of the proof, so it runs the unchanged graph.
    """

    def __init__(self, graph: ForeignGraph) -> None:
        super().__init__()
        self.graph = graph
        self.multiply_adds = graph.multiply_adds
        self._session = _session(graph.original)
        weights = (
            tensor
            for tensor in graph.model.graph.initializer
            if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
        )
        for index, tensor in enumerate(weights):
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            self.register_parameter(f"weight_{index}", nn.Parameter(value, requires_grad=False))

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the graph on the CPU; with a fixed batch size, in calls of that size."""
        images = pixels.numpy()
        if self.graph.layout is Layout.NHWC:
            images = images.transpose(0, 2, 3, 1)
        if self.graph.half:
            images = images.astype(np.float16)
        size = self.graph.fixed_batch or len(images)
        starts = range(0, len(images), size)
        parts = [self._run(images[start : start + size], size) for start in starts]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    def _run(self, images: np.ndarray, size: int) -> np.ndarray:
        filled = np.concatenate([images, np.repeat(images[:1], size - len(images), axis=0)])
        outputs = {value.name for value in self._session.get_outputs()}
        name = self.graph.output_name
        (scores,) = self._session.run(
            [name if name in outputs else self._only_map(outputs)],
            {self.graph.input_name: np.ascontiguousarray(filled)},
        )
        if isinstance(scores, list):
            # A ZipMap's dictionaries keep the order of the classes.
            scores = np.array([list(row.values()) for row in scores], np.float32)
        found: np.ndarray = scores[: len(images)].reshape(len(images), -1)
        return found

    def _only_map(self, outputs: set[str]) -> str:
        kinds = {value.name: value.type for value in self._session.get_outputs()}
        return next(name for name in sorted(outputs) if kinds[name].startswith("seq(map"))


def from_onnx(
    path: Path,
    graph: ForeignGraph,
    data: DataDescription,
    output: OutputKind | None = None,
    channel_order: ChannelOrder = ChannelOrder.RGB,
) -> ModelSource:
    """Make a source of an imported graph.

    Args:
        path: The file of the graph.
        graph: Its content.
        data: Classes, normalization and preprocessing; the size must be the graph's.
        output: Kind of the graph's output; None means logits, and the graph must not end in a
            softmax or a sigmoid.
        channel_order: Of the graph's input.

    Raises:
        InputError: ONNX Runtime cannot run the graph for every batch size, or its output is not of
            the given kind.
    """
    try:
        net = OnnxNet(graph).eval()
    # ONNX Runtime's exceptions have no common base.
    except Exception as error:
        raise InputError(
            f"{path.name}: ONNX Runtime cannot load it: {runtime_reason(error)}"
        ) from error
    _check_output(path, graph, output)
    _check_batches(path, graph)
    return ModelSource(
        net,
        data,
        1.0,
        digest_of_file(path),
        "onnx",
        {},
        accuracy={},
        output=output or OutputKind.LOGITS,
        channel_order=channel_order,
        precision=graph.precision,
        formats=(ArtifactFormat.ONNX,),
    )


def wrap(source: ModelSource, net: OnnxNet) -> ModelProto:
    """Add the normalization before a graph, and probabilities and logits after it.

    Raises:
        UnsupportedNetError: The parts do not fit together.
    """
    graph = net.graph
    model = onnx.compose.add_prefix(graph.model, _PREFIX)
    inner = model.graph
    image, scores = inner.input[0].name, inner.output[0].name
    before = _normalizing_nodes(source, graph, image)
    after = _scoring_nodes(source, scores)
    nodes = [*before, *inner.node, *after]
    for index, node in enumerate(nodes):
        # Quantization excludes nodes by name.
        node.name = node.name or f"{_OURS}{node.op_type}_{index}"
    del inner.node[:]
    inner.node.extend(nodes)
    inner.initializer.extend(_constants(source))
    size, classes = source.data.preprocessing, len(source.data.classes)
    del inner.input[:], inner.output[:]
    inner.input.append(_value(INPUT_NAME, TensorProto.UINT8, [size.height_px, size.width_px, 3]))
    inner.output.extend(_value(name, TensorProto.FLOAT, [classes]) for name in Outputs._fields)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise UnsupportedNetError(f"the graph cannot be wrapped: {one_line(error)}") from error
    return model


def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Failures are raised; a log line would report them twice.
    options.log_severity_level = _LOG_FATAL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _check_output(path: Path, graph: ForeignGraph, stated: OutputKind | None) -> None:
    found = graph.ends_in
    if found is None or found is stated or (found is OutputKind.SIGMOID and stated):
        return
    kind = "softmax" if found is OutputKind.PROBABILITIES else "sigmoid"
    raise InputError(
        f"{path.name}: output {graph.output_name!r}: expected logits, the graph ends in a {kind}; "
        f"publish with --output {found.value}"
    )


def _check_batches(path: Path, graph: ForeignGraph) -> None:
    """Run the graph with a free batch axis on batches of several sizes.

    Raises:
        InputError: It fails; the message names the node that fixes the batch.
    """
    sides = (graph.height_px, graph.width_px)
    channels = graph.channels
    shape = (channels, *sides) if graph.layout is Layout.NCHW else (*sides, channels)
    dtype = np.float16 if graph.half else np.float32
    declared = (
        "is declared free, but"
        if graph.fixed_batch is None
        else f"is fixed to {graph.fixed_batch} and cannot be made free:"
    )
    try:
        session = _session(graph.model.SerializeToString())
        for batch in _TRIAL_BATCHES:
            images = np.zeros((batch, *shape), dtype)
            (scores,) = session.run(None, {graph.input_name: images})
            if len(scores) != batch:
                raise UnsupportedNetError(f"{len(scores)} rows for {batch} images")
    except Exception as error:
        reason = runtime_reason(error)
        if baked := baked_reshapes(graph.model):
            node = baked[0]
            name = node.name or node.output[0]
            reason = f"node {name!r} (Reshape) has a fixed batch in its shape"
        raise InputError(
            f"{path.name}: the batch axis {declared} {reason}; export it again with a dynamic "
            "batch axis"
        ) from error


def _normalizing_nodes(source: ModelSource, graph: ForeignGraph, image: str) -> list[NodeProto]:
    """Return a graph that converts pixels `[N, H, W, 3]` uint8 to the graph's own input."""
    kind = TensorProto.FLOAT16 if graph.half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", [INPUT_NAME], [f"{_OURS}floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{_OURS}floats", f"{_OURS}scale"], [f"{_OURS}scaled"]),
        helper.make_node("Add", [f"{_OURS}scaled", f"{_OURS}shift"], [f"{_OURS}rgb"]),
    ]
    last = f"{_OURS}rgb"
    if source.channel_order is ChannelOrder.BGR:
        nodes.append(
            helper.make_node("Gather", [last, f"{_OURS}bgr_order"], [f"{_OURS}bgr"], axis=3)
        )
        last = f"{_OURS}bgr"
    if source.channel_order is ChannelOrder.GRAY:
        weighted = f"{_OURS}weighted"
        nodes.append(helper.make_node("Mul", [last, f"{_OURS}luma"], [weighted]))
        # In operators that have one form in all operator sets, and that int8 leaves alone.
        parts = [f"{_OURS}{color}" for color in ("red", "green", "blue")]
        nodes += [
            helper.make_node("Gather", [weighted, f"{part}_index"], [part], axis=3)
            for part in parts
        ]
        last = f"{_OURS}gray"
        nodes.append(helper.make_node("Sum", parts, [last]))
    if graph.layout is Layout.NCHW:
        nodes.append(helper.make_node("Transpose", [last], [f"{_OURS}planes"], perm=[0, 3, 1, 2]))
        last = f"{_OURS}planes"
    nodes.append(helper.make_node("Cast", [last], [image], to=kind))
    return nodes


def _scoring_nodes(source: ModelSource, scores: str) -> list[NodeProto]:
    """Return a graph that turns the scores `[N, K]` or `[N, K, 1, 1]` into the two outputs."""
    logits, probabilities = Outputs._fields
    flat = f"{_OURS}scores"
    nodes = [
        helper.make_node("Cast", [scores], [f"{_OURS}wide"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", [f"{_OURS}wide"], [flat], axis=1),
    ]
    if source.output is OutputKind.LOGITS:
        return [
            *nodes,
            helper.make_node("Identity", [flat], [logits]),
            helper.make_node("Div", [flat, f"{_OURS}temperature"], [f"{_OURS}calibrated"]),
            helper.make_node("Softmax", [f"{_OURS}calibrated"], [probabilities], axis=1),
        ]
    return [
        *nodes,
        helper.make_node("Identity", [flat], [probabilities]),
        helper.make_node("Max", [flat, f"{_OURS}least"], [f"{_OURS}positive"]),
        helper.make_node("Log", [f"{_OURS}positive"], [logits]),
    ]


def _constants(source: ModelSource) -> list[TensorProto]:
    mean, std = (np.array(values, np.float64) for values in (source.data.mean, source.data.std))
    values: dict[str, np.ndarray] = {
        "scale": (1 / (255 * std)).astype(np.float32),
        "shift": (-mean / std).astype(np.float32),
    }
    if source.channel_order is ChannelOrder.BGR:
        values["bgr_order"] = np.array([2, 1, 0], np.int64)
    if source.channel_order is ChannelOrder.GRAY:
        values["luma"] = np.array(LUMA, np.float32)
        for index, color in enumerate(("red", "green", "blue")):
            values[f"{color}_index"] = np.array([index], np.int64)
    if source.output is OutputKind.LOGITS:
        values["temperature"] = np.array(source.temperature, np.float32)
    else:
        values["least"] = np.array(LEAST_PROBABILITY[source.output], np.float32)
    return [numpy_helper.from_array(value, _OURS + name) for name, value in values.items()]


def _value(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [BATCH_AXIS, *shape])


def upgrade_for_int8(model: ModelProto) -> ModelProto:
    """Return a graph whose operator set has per-channel scales."""
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset >= _LEAST_OPSET_FOR_INT8:
        return model
    try:
        return onnx.version_converter.convert_version(model, _NEWEST_OPSET_FOR_INT8)
    # The converter's exceptions have no common base.
    except Exception as error:
        raise UnsupportedNetError(
            f"precision int8: operator set {opset} cannot be converted to "
            f"{_NEWEST_OPSET_FOR_INT8}: {one_line(error)}"
        ) from error
