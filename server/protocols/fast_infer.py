"""ModelInfer for the common request, read from the wire and written to it without message objects.

Most requests of a caller differ in nothing but their id and their pixels. So all of a request but
these, its head, is understood once, by the generated messages and the same functions that serve
every other request, and kept. Later requests with that head only have their fields' lengths walked:
the pixels become a view of the message, and the reply is put together from prepared pieces.

Whatever is out of the ordinary (typed contents, image files, classes, fields in another order, an
error) has no `Plan`; the general way answers it. Both ways must give the same replies;
tests/server/test_fast_infer.py holds them against each other.

Source of the wire format: https://protobuf.dev/programming-guides/encoding.
"""

import math
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from convoy.oip.v2 import inference_pb2 as pb
from server.errors import RequestError
from server.manifest import Manifest
from server.protocols.inference import version_number
from server.protocols.oip_messages import inputs_of, parameters_of, requested_outputs_of
from server.protocols.options import RequestOptions, read_options
from server.protocols.outputs import wanted_outputs
from server.protocols.tensors import PIXELS, check_header
from server.requests import Images, Outputs
from server.served_model import ServedModel

# A field's number and its wire type, as the byte before its contents.
_ID = 0x1A
_RAW_INPUT = 0x3A
_RAW_OUTPUT = b"\x32"
# Model's name and version, parameters, inputs, outputs.
_OF_HEAD = frozenset({0x0A, 0x12, 0x22, 0x2A, 0x32})
_CONTINUES = 0x80

# More or longer heads than callers of good will send.
_MAX_HEADS = 1024
_MAX_HEAD_BYTES = 1024
_MAX_PLANS = 8


@dataclass(frozen=True, slots=True)
class Fields:
    """A message taken apart.

    Attributes:
        head: The message without its id and its pixels.
        id: The id's field, tag included; may be empty.
        start: Where the pixels begin in the message; they are all that follows.
    """

    head: bytes
    id: bytes
    start: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer requests with one head by one version of a model.

    Attributes:
        shape: `(N, H, W, 3)` of the pixels.
        size_bytes: Of the pixels.
        options: What the parameters ask for.
        before_id: The reply up to its id.
        after_id: The outputs' names, types and shapes.
        scores: Names of the outputs, each with what stands before its scores.
    """

    shape: tuple[int, ...]
    size_bytes: int
    options: RequestOptions
    before_id: bytes
    after_id: bytes
    scores: tuple[tuple[str, bytes], ...]

    def images(self, message: bytes, fields: Fields) -> Images:
        """Returns the pixels `[N, H, W, 3]`, a view of the message."""
        return np.frombuffer(message, np.uint8, self.size_bytes, fields.start).reshape(self.shape)

    def reply(self, fields: Fields, outputs: Outputs) -> bytes:
        """Returns the reply as it is on the wire."""
        pieces = [self.before_id, fields.id, self.after_id]
        for name, prefix in self.scores:
            scores = outputs.logits if name == "logits" else outputs.probabilities
            pieces += (prefix, scores.astype("<f4", copy=False).tobytes())
        return b"".join(pieces)


class Head:
    """All of a request but its id and pixels, understood.

    Attributes:
        model: The model's name.
        version: 0 for the one in service.
    """

    __slots__ = ("_plans", "_request", "model", "version")

    def __init__(self, request: pb.ModelInferRequest) -> None:
        self.model = request.model_name
        self.version = version_number(request.model_version)
        self._request = request
        self._plans: dict[int, tuple[Manifest, Plan | None]] = {}

    def plan(self, model: ServedModel) -> Plan | None:
        """Returns how the model answers such requests; None where the general way has to."""
        manifest = model.manifest
        planned = self._plans.get(manifest.version)
        # A version that was taken away and published anew is another.
        if planned is None or planned[0] is not manifest:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            planned = self._plans[manifest.version] = manifest, _plan(self._request, model)
        return planned[1]


class HeadCache:
    """Keeps what was understood of heads.

    Example:
        fields = split(message)
        head = heads.read(fields) if fields else None
    """

    def __init__(self) -> None:
        self._heads: dict[bytes, Head | None] = {}

    def __len__(self) -> int:
        return len(self._heads)

    def read(self, fields: Fields) -> Head | None:
        """Returns a head; None where it cannot be understood."""
        try:
            return self._heads[fields.head]
        except KeyError:
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            head = self._heads[fields.head] = _understand(fields.head)
            return head


def split(message: bytes) -> Fields | None:
    """Takes a ModelInferRequest apart; None unless one raw input is its last field."""
    end = len(message)
    position = id_start = id_text = id_stop = 0
    try:
        while position < end:
            tag, length = message[position], message[position + 1]
            start = position + 2
            if length >= _CONTINUES:
                length, start = _long_length(message, start, length)
            stop = start + length
            if tag == _RAW_INPUT:
                if stop != end or position > _MAX_HEAD_BYTES:
                    return None
                # Beyond ASCII it must be valid UTF-8, which the generated messages check.
                if not message[id_text:id_stop].isascii():
                    return None
                head = message[:id_start] + message[id_stop:position]
                return Fields(head, message[id_start:id_stop], start)
            if tag == _ID and not id_stop:
                id_start, id_text, id_stop = position, start, stop
            elif tag not in _OF_HEAD:
                return None
            position = stop
    except IndexError:
        return None
    return None


def _long_length(message: bytes, start: int, length: int) -> tuple[int, int]:
    """Returns a length of several bytes, and where it ends."""
    length -= _CONTINUES
    for shift in (7, 14, 21, 28):
        byte = message[start]
        start += 1
        length |= (byte & 0x7F) << shift
        if byte < _CONTINUES:
            return length, start
    raise IndexError


def _understand(encoded: bytes) -> Head | None:
    try:
        return Head(pb.ModelInferRequest.FromString(encoded))
    except (DecodeError, RequestError):
        return None


def _plan(request: pb.ModelInferRequest, model: ServedModel) -> Plan | None:
    """Looks at the head as the general way would; what is refused there is answered there."""
    manifest = model.manifest
    try:
        (tensor,) = inputs_of(request)
        check_header(tensor, manifest, model.batcher.limits.max_request_images)
        wanted = wanted_outputs(requested_outputs_of(request), manifest)
        options = read_options(parameters_of(request.parameters))
    except (RequestError, ValueError):
        return None
    typed = request.inputs[0].HasField("contents")
    if tensor.datatype != PIXELS or typed or any(output.classes for output in wanted):
        return None
    shape = (tensor.shape[0], len(manifest.labels))
    size_bytes = 4 * math.prod(shape)
    prefix = _RAW_OUTPUT + _varint(size_bytes)
    version = str(manifest.version)
    outputs = [
        pb.ModelInferResponse.InferOutputTensor(name=each.name, datatype="FP32", shape=shape)
        for each in wanted
    ]
    return Plan(
        tensor.shape,
        math.prod(tensor.shape),
        options,
        pb.ModelInferResponse(model_name=manifest.name, model_version=version).SerializeToString(),
        pb.ModelInferResponse(outputs=outputs).SerializeToString(),
        tuple((output.name, prefix) for output in wanted),
    )


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= _CONTINUES:
        encoded.append(number & 0x7F | _CONTINUES)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
