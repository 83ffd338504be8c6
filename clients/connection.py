"""How a client reaches a server: addresses, deadline, retries, encryption, identity."""

import ipaddress
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from clients.errors import UsageError

DEFAULT_ADDRESS = "127.0.0.1:8001"
DEFAULT_TIMEOUT_S = 10.0

_GRPC_MOST_ATTEMPTS = 5
# gRPC loses a retry whose wait rounds to 0 ms: the call hangs until its deadline (grpc/grpc#41036).
_LEAST_BACKOFF_S = 0.01
_TRUE = frozenset({"1", "true", "yes", "on"})

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How gRPC itself retries what was refused before any work was done (gRPC proposal A6).

    Only UNAVAILABLE and RESOURCE_EXHAUSTED are retried, within the deadline of the call, after a
    jittered exponential backoff or, where the server names one, after its pushback. All calls of a
    channel share a budget: a server that refuses most of them is not asked again and again.

    Attributes:
        attempts: At most so many, the first included; 1 for no retry, gRPC allows no more than 5.
        initial_backoff_s: Around which the first wait is drawn.
        max_backoff_s: Above which the doubled waits do not grow.
        budget: Failures in a row after half of which retries stop; ten successes win one back.
    """

    attempts: int = 4
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 1.0
    budget: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= _GRPC_MOST_ATTEMPTS:
            raise UsageError(f"attempts: expected 1 to {_GRPC_MOST_ATTEMPTS}, got {self.attempts}")
        if not _LEAST_BACKOFF_S <= self.initial_backoff_s <= self.max_backoff_s:
            raise UsageError(
                f"initial_backoff_s: expected {_LEAST_BACKOFF_S} to max_backoff_s, "
                f"got {self.initial_backoff_s:g}"
            )

    def method_config(self) -> dict[str, object]:
        """The policy in the form of gRPC's service configuration."""
        if self.attempts == 1:
            return {}
        return {
            "methodConfig": [
                {
                    "name": [{}],
                    "retryPolicy": {
                        "maxAttempts": self.attempts,
                        "initialBackoff": f"{self.initial_backoff_s:.3f}s",
                        "maxBackoff": f"{self.max_backoff_s:.3f}s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                    },
                }
            ],
            "retryThrottling": {"maxTokens": self.budget, "tokenRatio": 0.1},
        }


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates, as PEM files.

    Attributes:
        ca: What the server's certificate must be signed by; the system's roots where it is None.
        certificate: The client's own, for mutual TLS; needs `key`.
        key: The private key of `certificate`.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            UsageError: One cannot be read, or a certificate comes without its key.
        """
        if (self.certificate is None) != (self.key is None):
            raise UsageError("TLS: expected a certificate and its key, got one of the two")
        return grpc.ssl_channel_credentials(
            *(
                None if path is None else _read(path)
                for path in (self.ca, self.key, self.certificate)
            )
        )


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """What may differ between connections.

    Attributes:
        retry: What is retried without the caller noticing.
        tls: None for a connection in the clear.
        token: Sent with every call as a bearer token; needs TLS, or a server on this machine.
        gzip: Whether requests are compressed. Encoded images do not shrink; tensors do.
        max_message_bytes: Largest request that is sent and largest reply that is accepted.
        private_connection: Whether to share no TCP connection with other clients of this process.
        keepalive_s: A peer that says nothing for so long during a call is asked whether it lives;
            servers may take offence at less than a minute.
        keepalive_timeout_s: How long it may take to say so, before its calls end as UNAVAILABLE.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    gzip: bool = False
    max_message_bytes: int = 64 * 1024 * 1024
    private_connection: bool = False
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("keepalive_s", "keepalive_timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected seconds above 0, got {getattr(self, name):g}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ConnectionOptions":
        """Reads CONVOY_TLS, CONVOY_TLS_CA, _CERTIFICATE, _KEY, CONVOY_TOKEN and CONVOY_GZIP."""

        def path(name: str) -> Path | None:
            value = environment.get(f"CONVOY_TLS_{name}")
            return Path(value) if value else None

        def flag(name: str) -> bool:
            return environment.get(name, "").lower() in _TRUE

        files = Tls(path("CA"), path("CERTIFICATE"), path("KEY"))
        wanted = flag("CONVOY_TLS") or files != Tls()
        return cls(
            tls=files if wanted else None,
            token=environment.get("CONVOY_TOKEN") or None,
            gzip=flag("CONVOY_GZIP"),
        )


def default_address() -> str:
    """CONVOY_ADDRESS, or the port that a server takes by default."""
    return os.environ.get("CONVOY_ADDRESS") or DEFAULT_ADDRESS


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a server is and how it is reached.

    Attributes:
        address: "HOST:PORT"; "IP:PORT,IP:PORT" or "dns:///NAME:PORT" to spread calls evenly over
            several servers, leaving out those that do not answer; anything gRPC itself takes.
        timeout_s: The deadline of a call, its retries included. The server sees it too and does no
            work for a call that is past it.
    """

    address: str
    timeout_s: float
    options: ConnectionOptions

    @classmethod
    def to(
        cls, address: str | None, timeout_s: float, options: ConnectionOptions | None
    ) -> "Connection":
        """Fills what was not said from the environment.

        Raises:
            UsageError: The environment or an argument is wrong.
        """
        if not timeout_s > 0:
            raise UsageError(f"timeout_s: expected seconds above 0, got {timeout_s:g}")
        return cls(
            address or default_address(),
            timeout_s,
            ConnectionOptions.from_environment() if options is None else options,
        )

    def metadata(self) -> Metadata:
        """What is sent with every call.

        Raises:
            UsageError: A token would cross the network in the clear.
        """
        options = self.options
        if options.token is None:
            return ()
        if options.tls is None and not self._stays_here():
            raise UsageError(f"token: it would reach {self.address} in the clear; use TLS")
        return (("authorization", f"Bearer {options.token}"),)

    def open(self) -> grpc.Channel:
        """Opens a channel; it connects with the first call."""
        arguments, compression = self._channel_arguments(), self._compression()
        if self.options.tls is None:
            return grpc.insecure_channel(self._target(), arguments, compression)
        credentials = self.options.tls.credentials()
        return grpc.secure_channel(self._target(), credentials, arguments, compression)

    def open_aio(self) -> grpc.aio.Channel:
        """Opens a channel for asyncio; it connects with the first call."""
        arguments, compression = self._channel_arguments(), self._compression()
        if self.options.tls is None:
            return grpc.aio.insecure_channel(self._target(), arguments, compression)
        credentials = self.options.tls.credentials()
        return grpc.aio.secure_channel(self._target(), credentials, arguments, compression)

    def _compression(self) -> grpc.Compression:
        return grpc.Compression.Gzip if self.options.gzip else grpc.Compression.NoCompression

    def _channel_arguments(self) -> list[tuple[str, object]]:
        answer_within_ms = math.ceil(1000 * self.options.keepalive_timeout_s)
        config = {
            "loadBalancingConfig": [{"round_robin": {}}],
            **self.options.retry.method_config(),
        }
        return [
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_send_message_length", self.options.max_message_bytes),
            ("grpc.max_receive_message_length", self.options.max_message_bytes),
            # A server that was restarted is found again soon.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # A peer that vanished without a word is noticed during a call.
            ("grpc.keepalive_time_ms", math.ceil(1000 * self.options.keepalive_s)),
            ("grpc.keepalive_timeout_ms", answer_within_ms),
            # Without it gRPC waits a minute for the answer, whatever the line above says.
            ("grpc.http2.ping_timeout_ms", answer_within_ms),
            ("grpc.use_local_subchannel_pool", int(self.options.private_connection)),
        ]

    def _target(self) -> str:
        if "," not in self.address:
            return self.address
        hosts = self.address.split(",")
        try:
            families = {ipaddress.ip_address(_host(host)).version for host in hosts}
            (family,) = families
        except ValueError:
            raise UsageError(
                f"address: expected IP:PORT,IP:PORT of one family, or dns:///NAME:PORT, "
                f"got {self.address!r}"
            ) from None
        return f"ipv{family}:{self.address}"

    def _stays_here(self) -> bool:
        if self.address.startswith("unix:"):
            return True
        hosts = [_host(part) for part in self.address.split(",")]
        return all(host == "localhost" or _is_loopback(host) for host in hosts)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"TLS: {path}: {error.strerror or 'cannot be read'}") from error
