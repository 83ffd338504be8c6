"""The server's answers as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convoy.v1 import classifier_pb2 as pb

_NS_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class ClassScore:
    """A class with its probability, 0 to 1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class StageTimes:
    """The stages of a request inside the server, in seconds."""

    decode_s: float
    queue_s: float
    inference_s: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one image.

    Attributes:
        model: Its name.
        version: The version that answered.
        classes: The most probable ones in descending order.
        batch_size: Images in the batch that ran this one.
        abstain: Whether the largest probability is below the model's threshold.
    """

    model: str
    version: int
    classes: tuple[ClassScore, ...]
    times: StageTimes
    batch_size: int
    abstain: bool = False

    @property
    def best(self) -> ClassScore:
        """The most probable class."""
        return self.classes[0]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model version in service.

    Attributes:
        backend: The backend, e.g. "onnx".
        device: The device in use, e.g. "cuda:0".
        provider: The execution provider, e.g. "CUDAExecutionProvider".
        max_request_images: The most images in a request; 0 if the server does not say.
    """

    name: str
    version: int
    ready: bool
    height_px: int
    width_px: int
    labels: tuple[str, ...]
    backend: str
    device: str
    provider: str
    max_batch_size: int
    max_request_images: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """The health of a server or of one of its models.

    Attributes:
        live: False if only a restart of the server helps.
        ready: Whether it accepts requests.
    """

    live: bool
    ready: bool


@dataclass(frozen=True, slots=True)
class Inference:
    """The output tensors of one call.

    Attributes:
        version: The version that ran, as the server wrote it; empty if the server omits it.
        outputs: By name, in the model's order.
        request_id: The id of the request, as the server returned it.
    """

    model: str
    version: str
    outputs: Mapping[str, NDArray[np.generic]]
    request_id: str = ""


def classification(reply: pb.ClassifyResponse) -> Classification:
    """Convert a reply."""
    times = reply.times
    return Classification(
        model=reply.model,
        version=reply.version,
        classes=tuple(ClassScore(c.label, c.index, c.probability) for c in reply.classes),
        times=StageTimes(
            times.decode_ns / _NS_PER_S, times.queue_ns / _NS_PER_S, times.inference_ns / _NS_PER_S
        ),
        batch_size=reply.batch_size,
        abstain=reply.abstain,
    )


def model_status(message: pb.ModelStatus) -> ModelStatus:
    """Convert one entry of a list of models."""
    return ModelStatus(
        name=message.model,
        version=message.version,
        ready=message.ready,
        height_px=message.height,
        width_px=message.width,
        labels=tuple(message.labels),
        backend=message.backend,
        device=message.device,
        provider=message.provider,
        max_batch_size=message.max_batch_size,
        max_request_images=message.max_request_images,
    )
