"""An inference of the Open Inference Protocol, for gRPC and REST."""

import re
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from convoy.server.errors import InvalidRequestError
from convoy.server.images.decoding import ImageDecoder
from convoy.server.models.registry import Models, ServedModel
from convoy.server.protocol.parameters import DEFAULT_OPTIONS, RequestOptions
from convoy.server.protocol.tensors import (
    InputTensor,
    OutputTensor,
    RequestedOutput,
    images_of,
    output_tensors,
    wanted_outputs,
)
from convoy.server.requests import Images, Prediction

# The protocol's extensions that an inference supports by gRPC and by REST.
INFERENCE_EXTENSIONS = ("classification", "schedule_policy", "binary_tensor_data", "parameters")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class Call(Protocol):
    """The part of a call that an inference needs."""

    def uses(self, model: ServedModel) -> ServedModel:
        """Hold a lease on the model until the call ends, count the call for it, and return it."""

    def within(self, timeout_s: float) -> float:
        """Limit the deadline to a time after the request's arrival, and return it."""

    def infer(self, model: ServedModel, images: Images, priority: int) -> Awaitable[Prediction]:
        """Run images, until the deadline at most."""


@dataclass(frozen=True, slots=True)
class InferenceQuery:
    """An inference request.

    Attributes:
        version: Empty for the default version.
        outputs: Empty for all outputs.
    """

    model: str
    version: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput] = ()
    options: RequestOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, slots=True)
class InferenceAnswer:
    """The answer to an inference request.

    Attributes:
        model: The version that ran it.
        prediction: The prediction with its times.
        decode_s: The time to decode image files; 0 without any.
    """

    model: ServedModel
    tensors: Sequence[OutputTensor]
    prediction: Prediction
    decode_s: float


class Inference:
    """Answers inference requests of the Open Inference Protocol.

    Args:
        models: The models in service.
        decoder: Decodes image files.
    """

    def __init__(self, models: Models, decoder: ImageDecoder) -> None:
        self._models = models
        self._decoder = decoder

    def find(self, name: str, version: str) -> ServedModel:
        """Return the model for a request; an empty version stands for the default one.

        Raises:
            InvalidRequestError: The version is not a number.
            UnavailableError: The server starts or drains.
            ModelNotFoundError: There is no such model or version.
        """
        return self._models.find(name, version_number(version))

    async def answer(self, query: InferenceQuery, call: Call) -> InferenceAnswer:
        """Run a request's images and return the outputs that it asks for.

        Raises:
            RequestError: It cannot be answered.
        """
        model = call.uses(self.find(query.model, query.version))
        wanted = wanted_outputs(query.outputs, model.manifest)
        images = images_of(query.inputs, model.manifest, model.batcher.limits.max_request_images)
        deadline_s = call.within(query.options.timeout_s)
        decode_s = 0.0
        if isinstance(images, tuple):
            started_s = time.monotonic()
            steps = model.manifest.preprocessing
            images = await self._decoder.decode(images, steps, deadline_s, model.requests.decoded)
            decode_s = time.monotonic() - started_s
        prediction = await call.infer(model, images, query.options.priority)
        tensors = output_tensors(wanted, prediction.outputs, model.manifest.labels)
        return InferenceAnswer(model, tensors, prediction, decode_s)


def version_number(text: str) -> int:
    """Return the version that a request names; 0 for an empty one.

    Raises:
        InvalidRequestError: It is not a number.
    """
    if text and not _VERSION.fullmatch(text):
        raise InvalidRequestError(f"version: expected a whole number above 0, got {text!r}")
    return int(text or 0)
