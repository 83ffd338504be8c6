"""What a front end and its owner say to each other.

Those of every request are tuples, which pickle in about a microsecond.
"""

from dataclasses import dataclass
from typing import NamedTuple

from server.backends.runtimes import Runtime
from server.batcher import BatchingLimits
from server.catalogue import ServerState
from server.errors import RequestError
from server.manifest import Manifest
from server.metrics import RunsOn
from server.requests import Scores
from server.settings import ServerSettings
from server.statistics import ModelStatistics

# A metric's sample: its name and its labels, sorted.
SampleKey = tuple[str, tuple[tuple[str, str], ...]]


class Infer(NamedTuple):
    """A front end asks for a prediction.

    Attributes:
        number: Names the request in the answer.
        model: The key of the version.
        offset: Where the pixels begin in the memory.
        shape: `(N, H, W, 3)`.
        deadline_s: On the clock `time.monotonic`, which all processes share.
    """

    number: int
    model: int
    offset: int
    shape: tuple[int, ...]
    deadline_s: float
    priority: int
    client: str


class Cancel(NamedTuple):
    """The caller of a request has left; it is answered, to nobody, when its pixels are free."""

    number: int


class Answered(NamedTuple):
    """The prediction that a front end asked for."""

    number: int
    logits: Scores
    probabilities: Scores
    queue_s: float
    inference_s: float
    batch_size: int


class Refused(NamedTuple):
    """Why there is none."""

    number: int
    error: RequestError


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a front end.

    Attributes:
        max_message_bytes: Of a request and of a reply.
        processors: That it may use for decoding.
    """

    settings: ServerSettings
    max_message_bytes: int
    processors: int


@dataclass(frozen=True, slots=True)
class Listening:
    """A front end takes calls."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A front end cannot start; `reason` is for whoever starts the server."""

    reason: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """A version takes requests; `key` names it from here on."""

    key: int
    manifest: Manifest
    runtime: Runtime
    runs_on: RunsOn
    limits: BatchingLimits


@dataclass(frozen=True, slots=True)
class MadeDefault:
    """A version answers requests that name none."""

    key: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A version is to be found no more."""

    key: int


@dataclass(frozen=True, slots=True)
class Released:
    """No call of a front end holds a removed version any longer."""

    key: int


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model begins or ends to take requests; `ready` is None where it is gone."""

    name: str
    ready: bool | None


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The server is at another point of its life."""

    state: ServerState


@dataclass(frozen=True, slots=True)
class AllHeard:
    """A front end has done what it was told up to the point where the owner asked by the same."""


@dataclass(frozen=True, slots=True)
class Drain:
    """A front end shall answer what it accepted, for so long, and end."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class AskStatistics:
    """A front end asks what the batcher of a version did so far."""

    number: int
    model: int


@dataclass(frozen=True, slots=True)
class StatisticsRead:
    """The answer."""

    number: int
    statistics: ModelStatistics


@dataclass(frozen=True, slots=True)
class Samples:
    """What a front end counted so far."""

    values: dict[SampleKey, float]
