"""Readiness: whether the process is live, and the server and each version ready.

`readiness` derives all of it from one state. The health replies of all protocols are read from its
result; docs/operations.md has the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from convoy.server.batching import Health

VersionKey = tuple[str, int]
"""A model's name and the number of a version."""


class ServerState(Enum):
    """The phases of the server's life."""

    STARTING = "starting"
    SERVING = "serving"
    # Answers requests, but reports not ready, so that load balancers send no more.
    LAME_DUCK = "lame duck"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Readiness:
    """What the server reports about itself at a moment.

    Attributes:
        live: False if only a restart helps.
        ready: Whether callers should send requests to this server.
        models: Whether each model in service is ready, by name: its default version decides.
        versions: The same for each version in service.
    """

    live: bool
    ready: bool
    models: Mapping[str, bool]
    versions: Mapping[VersionKey, bool]


def readiness(
    state: ServerState,
    reachable: bool,
    versions: Mapping[VersionKey, Health],
    defaults: Mapping[str, int],
) -> Readiness:
    """Derive what the server reports about itself.

    Versions other than the default, such as a canary, affect neither the model nor the server.

    Args:
        state: The phase of the server's life.
        reachable: Whether the processes that answer callers are there.
        versions: The health of each version in service.
        defaults: The default version of each model in service.
    """
    serving = reachable and state is ServerState.SERVING
    ready = {key: serving and health is Health.HEALTHY for key, health in versions.items()}
    models = {name: ready[name, version] for name, version in defaults.items()}
    live = all(versions[key] is not Health.HUNG for key in defaults.items())
    return Readiness(live, live and any(models.values()), models, ready)
