"""Check an ONNX graph: what it refers to, and which of its nodes run beside the device."""

from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError, Message

from convoy.onnx.v1 import graph_pb2 as pb
from convoy.server.errors import DeviceError, GraphError
from convoy.server.models.repository import VerifiedFile

OUTPUT_NAMES = ("logits", "probabilities")
# The domains that ONNX Runtime implements itself; any other needs a custom library.
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# It names a compiled program in another file.
_OUTSIDE_OPERATORS = frozenset({("com.microsoft", "EPContext")})
# Operators that compute shapes, indices and masks. ONNX Runtime keeps these on the CPU, next to the
# shapes, on purpose. For floating point all of them have CUDA kernels.
SHAPE_OPERATORS = frozenset((
    "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten",
    "Gather", "GatherND", "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not",
    "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub",
    "Tile", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
# TensorProto.DataType: int32, int64, bool.
_INDEX_TYPES = frozenset({6, 7, 9})
_LISTED_NODES = 3


def check_self_contained(file: VerifiedFile) -> pb.Graph:
    """Reject external data, custom operators and files that are not ONNX; return the graph.

    Raises:
        GraphError: The message says which; it repeats no path from the file.
    """
    try:
        model = pb.Model.FromString(file.content)
    except DecodeError as error:
        raise GraphError(f"{file.name}: expected an ONNX model") from error
    if not model.HasField("graph"):
        raise GraphError(f"{file.name}: expected an ONNX model, found no graph in it")
    domains = _KNOWN_DOMAINS | {function.domain for function in model.functions}
    for message in _messages(model):
        match message:
            case pb.Tensor() if message.data_location or message.external_data:
                raise GraphError(f"{file.name}: expected all tensors in it, found external data")
            case pb.Node() if (
                message.domain not in domains
                or (message.domain, message.op_type) in _OUTSIDE_OPERATORS
            ):
                raise GraphError(
                    f"{file.name}: expected ONNX's own operators, found {message.op_type!r} "
                    f"of the domain {message.domain!r}"
                )
    return model.graph


def activation_nodes(graph: pb.Graph) -> frozenset[str]:
    """Return the names of the nodes that compute activations, as far as the graph states types.

    An activation is a tensor of two axes or more that holds neither indices nor a mask.
    """
    activations = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type not in _INDEX_TYPES
        and len(value.type.tensor_type.shape.dim) > 1
    }
    return frozenset(node.name for node in graph.node if activations.intersection(node.output))


def check_placement(on_cpu: Iterable[tuple[str, str]], activations: frozenset[str]) -> None:
    """Check that what runs on the CPU beside a GPU computes shapes only.

    Args:
        on_cpu: Operator and name of each node on the CPU.
        activations: The names of nodes that compute activations.

    Raises:
        DeviceError: Another node runs there, which would slow down every batch.
    """
    misplaced = [
        f"{operator} {name!r}"
        for operator, name in on_cpu
        if operator not in SHAPE_OPERATORS or name in activations
    ]
    if misplaced:
        listed = ", ".join(misplaced[:_LISTED_NODES])
        more = f" and {len(misplaced) - _LISTED_NODES} more" * (len(misplaced) > _LISTED_NODES)
        raise DeviceError(
            f"expected only nodes that compute shapes on the CPU beside CUDA, found {listed}{more}"
        )


def _messages(root: Message) -> Iterator[Message]:
    """Yield all messages below a root; no recursion, since a file may nest without limit."""
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                children: Iterable[Message] = value if field.is_repeated else (value,)
                waiting.extend(children)
