"""The fast path of ModelInfer: parse and build the common messages without message objects.

Most requests of a caller differ only in their id and their pixels. The rest of a request, its head,
is parsed once, by the generated messages and the functions that serve every other request, and
cached. For later requests with that head the fast path only skips over the fields: the pixels
become a view of the message, and the reply is joined from prepared parts.

A request with anything uncommon (typed contents, image files, classes, fields in another order, an
error) has no `Plan`, and the general path answers it. Both paths must give the same replies;
tests/server/grpc/test_fast_infer.py compares them.

Source of the wire format: https://protobuf.dev/programming-guides/encoding.
"""

import math
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from convoy.oip.v2 import inference_pb2 as pb
from convoy.server.errors import RequestError
from convoy.server.grpc.oip_messages import inputs_of, parameters_of, requested_outputs_of
from convoy.server.models.manifest import Manifest
from convoy.server.models.registry import ServedModel
from convoy.server.protocol.inference import version_number
from convoy.server.protocol.parameters import RequestOptions, read_options
from convoy.server.protocol.tensors import PIXELS, check_header, wanted_outputs
from convoy.server.requests import Images, Outputs

# Tags: the byte of a field's number and wire type.
_ID = 0x1A
_RAW_INPUT = 0x3A
# Model name and version, parameters, inputs, outputs.
_HEAD_TAGS = frozenset({0x0A, 0x12, 0x22, 0x2A, 0x32})
_CONTINUES = 0x80

# Well-behaved callers send fewer and shorter heads.
_MAX_HEADS = 1024
_MAX_HEAD_BYTES = 1024
_MAX_PLANS = 8


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a message.

    Attributes:
        head: The message without its id and its pixels.
        id: The field of the id, tag included; may be empty.
        start: The offset of the pixels, which are the rest of the message.
    """

    head: bytes
    id: bytes
    start: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer requests with one head by one version of a model.

    Attributes:
        shape: `(N, H, W, 3)` of the pixels.
        size_bytes: The size of the pixels.
        options: The parsed parameters.
        before_id: The reply up to its id.
        after_id: The names, types and shapes of the outputs.
        scores: The names of the outputs, each with the tag and length of its scores.
    """

    shape: tuple[int, ...]
    size_bytes: int
    options: RequestOptions
    before_id: bytes
    after_id: bytes
    scores: tuple[tuple[str, bytes], ...]

    def images(self, message: bytes, fields: Fields) -> Images:
        """Return the pixels `[N, H, W, 3]`, a view of the message."""
        return np.frombuffer(message, np.uint8, self.size_bytes, fields.start).reshape(self.shape)

    def reply(self, fields: Fields, outputs: Outputs) -> bytes:
        """Return the serialized reply."""
        parts = [self.before_id, fields.id, self.after_id]
        for name, prefix in self.scores:
            scores = outputs.logits if name == "logits" else outputs.probabilities
            parts += (prefix, scores.astype("<f4", copy=False).tobytes())
        return b"".join(parts)


class Head:
    """The parsed head of a request.

    Attributes:
        model: The model's name.
        version: 0 for the default version.
    """

    __slots__ = ("_plans", "_request", "model", "version")

    def __init__(self, request: pb.ModelInferRequest) -> None:
        self.model = request.model_name
        self.version = version_number(request.model_version)
        self._request = request
        self._plans: dict[int, tuple[Manifest, Plan | None]] = {}

    def plan(self, model: ServedModel) -> Plan | None:
        """Return how the model answers such requests; None for the general path."""
        manifest = model.manifest
        planned = self._plans.get(manifest.version)
        # A version that was removed and published again has another manifest.
        if planned is None or planned[0] is not manifest:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            planned = self._plans[manifest.version] = manifest, _plan(self._request, model)
        return planned[1]


class HeadCache:
    """Caches parsed heads.

    Example:
        fields = split(message)
        head = heads.read(fields) if fields else None
    """

    def __init__(self) -> None:
        self._heads: dict[bytes, Head | None] = {}

    def __len__(self) -> int:
        return len(self._heads)

    def read(self, fields: Fields) -> Head | None:
        """Return a parsed head; None where it is invalid."""
        try:
            return self._heads[fields.head]
        except KeyError:
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            head = self._heads[fields.head] = _parse(fields.head)
            return head


def split(message: bytes) -> Fields | None:
    """Split a ModelInferRequest into its fields; None unless one raw input is its last field."""
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
                # Beyond ASCII the id must be valid UTF-8, which the generated messages check.
                if not message[id_text:id_stop].isascii():
                    return None
                head = message[:id_start] + message[id_stop:position]
                return Fields(head, message[id_start:id_stop], start)
            if tag == _ID and not id_stop:
                id_start, id_text, id_stop = position, start, stop
            elif tag not in _HEAD_TAGS:
                return None
            position = stop
    except IndexError:
        return None
    return None


def _long_length(message: bytes, start: int, length: int) -> tuple[int, int]:
    """Decode a length of several bytes; return it and the offset behind it."""
    length -= _CONTINUES
    for shift in (7, 14, 21, 28):
        byte = message[start]
        start += 1
        length |= (byte & 0x7F) << shift
        if byte < _CONTINUES:
            return length, start
    raise IndexError


def _parse(encoded: bytes) -> Head | None:
    try:
        return Head(pb.ModelInferRequest.FromString(encoded))
    except (DecodeError, RequestError):
        return None


def _plan(request: pb.ModelInferRequest, model: ServedModel) -> Plan | None:
    """Check the head as the general path does; None where that path has to answer."""
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
    one_output = pb.ModelInferResponse(raw_output_contents=[bytes(size_bytes)])
    prefix = one_output.SerializeToString()[:-size_bytes]
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
