"""What the repository index says of a version."""

from dataclasses import dataclass
from enum import Enum


class VersionState(Enum):
    """Where a version is in its life, in the words of the protocol's repository index."""

    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version in the repository.

    Attributes:
        reason: Why it is not served, where that is known.
    """

    model: str
    version: int
    state: VersionState
    reason: str = ""
