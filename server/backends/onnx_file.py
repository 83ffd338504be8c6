"""Looks into an ONNX file before a runtime opens it: it must not reach outside itself."""

from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError, Message

from convoy.onnx.v1 import graph_pb2 as pb
from server.errors import GraphError
from server.repository import VerifiedFile

OUTPUT_NAMES = ("logits", "probabilities")
# What ONNX Runtime implements itself; any other domain asks for a library of somebody's.
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# Names a compiled program in another file.
_OUTSIDE_OPERATORS = frozenset({("com.microsoft", "EPContext")})


def check_self_contained(file: VerifiedFile) -> None:
    """Refuses external data, foreign operators and what is no ONNX file.

    Raises:
        GraphError: The message says which; no path of the file's is repeated.
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


def _messages(root: Message) -> Iterator[Message]:
    """Walks all messages below a root; without recursion, as a file may nest as it likes."""
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                children: Iterable[Message] = value if field.is_repeated else (value,)
                waiting.extend(children)
