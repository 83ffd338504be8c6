"""One inference of the Open Inference Protocol, for every face of the server that speaks it."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.catalogue import Models
from server.decoding import ImageDecoder
from server.errors import DeadlineExceededError, InvalidRequestError
from server.protocols.options import DEFAULT_OPTIONS, RequestOptions
from server.protocols.outputs import (
    OutputTensor,
    RequestedOutput,
    output_tensors,
    wanted_outputs,
)
from server.protocols.tensors import InputTensor, images_of
from server.requests import Prediction
from server.served_model import ServedModel

# Names of the protocol's extensions that work for an inference on every face.
INFERENCE_EXTENSIONS = ("classification", "schedule_policy", "binary_tensor_data", "parameters")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class Call(Protocol):
    """What the way a request came in knows about it."""

    deadline_s: float
    client: str

    def uses(self, model: ServedModel) -> ServedModel:
        """Names the model that the call is counted for, and returns it."""

    def within(self, timeout_s: float) -> float:
        """Brings the deadline to at most so long after the request's arrival, and returns it."""


@dataclass(frozen=True, slots=True)
class InferenceQuery:
    """What a request asks for.

    Attributes:
        version: Empty for the one that the server's policy names.
        outputs: Empty for all.
    """

    model: str
    version: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput] = ()
    options: RequestOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, slots=True)
class InferenceAnswer:
    """The answer.

    Attributes:
        model: The version that gave it.
        prediction: With the times that it took.
        decode_s: What image files took to become pixels; 0 without any.
    """

    model: ServedModel
    tensors: Sequence[OutputTensor]
    prediction: Prediction
    decode_s: float


class Inference:
    """Answers requests of the Open Inference Protocol.

    Args:
        catalogue: The models in service.
        decoder: Brings image files to pixels.
    """

    def __init__(self, catalogue: Models, decoder: ImageDecoder) -> None:
        self._catalogue = catalogue
        self._decoder = decoder

    def find(self, name: str, version: str) -> ServedModel:
        """Returns the model for a request; an empty version is the one the policy names.

        Raises:
            InvalidRequestError: The version is no number.
            UnavailableError: The server starts or drains.
            ModelNotFoundError: There is no such model or version.
        """
        return self._catalogue.find(name, version_number(version))

    async def answer(self, query: InferenceQuery, call: Call) -> InferenceAnswer:
        """Runs a request's images and returns the outputs it wants.

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
            images = await self._decoder.decode(images, steps, deadline_s)
            decode_s = time.monotonic() - started_s
        try:
            # gRPC ends a call at its own deadline; a request's timeout is watched here.
            async with asyncio.timeout(_remaining_s(deadline_s)):
                prediction = await model.batcher.infer(
                    images, deadline_s, query.options.priority, call.client
                )
        except TimeoutError:
            raise DeadlineExceededError("the request's timeout passed while it waited") from None
        tensors = output_tensors(wanted, prediction.outputs, model.manifest.labels)
        return InferenceAnswer(model, tensors, prediction, decode_s)


def version_number(text: str) -> int:
    """Returns the version that a request names; 0 for an empty one.

    Raises:
        InvalidRequestError: It is no number.
    """
    if text and not _VERSION.fullmatch(text):
        raise InvalidRequestError(f"version: expected a whole number above 0, got {text!r}")
    return int(text or 0)


def _remaining_s(deadline_s: float) -> float | None:
    return None if deadline_s == float("inf") else deadline_s - time.monotonic()
