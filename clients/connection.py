"""How a client reaches a server."""

import json
import os
from dataclasses import dataclass

DEFAULT_ADDRESS = "127.0.0.1:8001"

# gRPC itself retries what was refused before any work was done: inside the call's deadline, with
# jittered exponential backoff, under a budget that a channel's calls share (gRPC proposal A6).
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}


def default_address() -> str:
    """CONVOY_ADDRESS, or the port that a server takes by default."""
    return os.environ.get("CONVOY_ADDRESS", DEFAULT_ADDRESS)


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Where the server is and how long it may take.

    Attributes:
        address: "HOST:PORT", or "dns:///NAME:PORT" to spread calls over every address of a name.
        timeout_s: The deadline of a call, its retries included. The server sees it too and does no
            work for a call that is past it.
        max_message_bytes: Largest reply that is accepted.
    """

    address: str
    timeout_s: float
    max_message_bytes: int = 64 * 1024 * 1024

    def channel_options(self) -> list[tuple[str, object]]:
        """The options that a gRPC channel is made with."""
        return [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_receive_message_length", self.max_message_bytes),
        ]
