"""How a client reaches a server: deadline, retries, encryption, identity, lifetime."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from convoy.client.addresses import check_address, grpc_target, has_several_names, is_local
from convoy.client.errors import LifetimeError, UsageError

DEFAULT_ADDRESS = "127.0.0.1:8001"
DEFAULT_TIMEOUT_S = 10.0

_GRPC_MOST_ATTEMPTS = 5
# gRPC loses a retry whose wait rounds to 0 ms: the call hangs until its deadline (grpc/grpc#41036).
_LEAST_BACKOFF_S = 0.01
_TRUE = frozenset({"1", "true", "yes", "on"})

REQUEST_ID_HEADER = "x-request-id"

Metadata = tuple[tuple[str, str], ...]


class Default(Enum):
    """Stands for the client's own setting where None has a meaning of its own."""

    TIMEOUT = "the client's timeout_s"


CLIENT_TIMEOUT: Final = Default.TIMEOUT
Timeout = float | None | Default


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How gRPC itself retries requests that the server rejected unprocessed (gRPC proposal A6).

    gRPC retries only UNAVAILABLE and RESOURCE_EXHAUSTED, within the deadline of the call, after a
    jittered exponential backoff or, where the server names one, after its pushback. All calls of a
    channel share a budget, so that retries do not multiply the load of an overloaded server.

    Attributes:
        attempts: The most attempts, the first included; 1 for no retry, at most 5.
        initial_backoff_s: The bound of the first random wait; it doubles with each attempt.
        max_backoff_s: The largest bound.
        budget: Retries stop after half as many failures in a row; ten successes restore one.
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
        """Return the policy in the form of gRPC's service configuration."""
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
        ca: The authority that must have signed the server's certificate; None for the system's.
        certificate: The client's own, for mutual TLS; needs `key`.
        key: The private key of `certificate`.
        server_name: The name that the server's certificate must have, where it is not the host of
            the address; required for a list of several host names.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

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
    """Options of a connection.

    Attributes:
        retry: How gRPC retries.
        tls: None for a connection without encryption.
        token: Sent with every call as a bearer token; needs TLS, or a server on this machine.
        gzip: Whether requests are compressed. Encoded images do not shrink; tensors do.
        max_message_bytes: The largest request to send and the largest reply to accept.
        wait_for_ready: Whether calls wait, within their deadline, for a server that cannot be
            reached yet; otherwise they fail as UnavailableError once the retries are used up.
        private_connection: Whether to share no TCP connection with other clients of this process.
        keepalive_s: How long a server may be silent during a call before the client sends a ping;
            servers may reject pings that are less than a minute apart.
        keepalive_timeout_s: How long the server may take to answer the ping before its calls end
            as UNAVAILABLE.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    gzip: bool = False
    max_message_bytes: int = 64 * 1024 * 1024
    wait_for_ready: bool = False
    private_connection: bool = False
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("keepalive_s", "keepalive_timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected seconds above 0, got {getattr(self, name):g}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ConnectionOptions":
        """Read CONVOY_TLS, CONVOY_TLS_CA, _CERTIFICATE, _KEY, _SERVER_NAME, CONVOY_TOKEN, _GZIP."""

        def path(name: str) -> Path | None:
            value = environment.get(f"CONVOY_TLS_{name}")
            return Path(value) if value else None

        def flag(name: str) -> bool:
            return environment.get(name, "").lower() in _TRUE

        server_name = environment.get("CONVOY_TLS_SERVER_NAME") or None
        tls = Tls(path("CA"), path("CERTIFICATE"), path("KEY"), server_name)
        return cls(
            tls=tls if flag("CONVOY_TLS") or tls != Tls() else None,
            token=environment.get("CONVOY_TOKEN") or None,
            gzip=flag("CONVOY_GZIP"),
        )


def default_address() -> str:
    """Return CONVOY_ADDRESS, or the default address of a server on this machine."""
    return os.environ.get("CONVOY_ADDRESS") or DEFAULT_ADDRESS


@dataclass(frozen=True, slots=True)
class Connection:
    """A server and how to reach it.

    Attributes:
        address: "HOST:PORT"; "HOST:PORT,HOST:PORT" or "dns:///NAME:PORT" to spread calls over
            several servers and around those that do not answer; any target of gRPC.
        timeout_s: The deadline of a call, its retries included; None for no deadline. The server
            sees it too and does no work for a call that is past it.
    """

    address: str
    timeout_s: float | None
    options: ConnectionOptions

    @classmethod
    def to(
        cls, address: str | None, timeout_s: float | None, options: ConnectionOptions | None
    ) -> "Connection":
        """Take what is not given from the environment.

        Raises:
            UsageError: The environment or an argument is wrong.
        """
        address = address or default_address()
        check_address(address)
        options = ConnectionOptions.from_environment() if options is None else options
        if options.tls and not options.tls.server_name and has_several_names(address):
            raise UsageError("TLS: several host names need Tls(server_name=…)")
        return cls(address, check_timeout(timeout_s), options)

    def metadata(self) -> Metadata:
        """Return the metadata of every call.

        Raises:
            UsageError: A token would cross the network without encryption.
        """
        options = self.options
        if options.token is None:
            return ()
        if options.tls is None and not is_local(self.address):
            raise UsageError(f"token: it would be sent to {self.address} unencrypted; use TLS")
        return (("authorization", f"Bearer {options.token}"),)

    def call_options(
        self,
        timeout_s: Timeout = CLIENT_TIMEOUT,
        metadata: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> dict[str, Any]:
        """Return gRPC's arguments of one call.

        Args:
            timeout_s: The deadline; None for none.
            metadata: Sent in addition to the connection's own.
            request_id: Sent as x-request-id.

        Raises:
            UsageError: An argument is wrong.
        """
        sent = list(self.metadata())
        for name, value in (metadata or {}).items():
            if name != name.lower() or name.startswith("grpc-"):
                raise UsageError(
                    f"metadata: expected a lower-case name that gRPC does not reserve, got {name!r}"
                )
            sent.append((name, value))
        if request_id is not None:
            sent.append((REQUEST_ID_HEADER, request_id))
        chosen_s = self.timeout_s if isinstance(timeout_s, Default) else check_timeout(timeout_s)
        return {
            "timeout": chosen_s,
            "metadata": tuple(sent),
            "wait_for_ready": self.options.wait_for_ready or None,
        }

    def open(self) -> grpc.Channel:
        """Open a channel; it connects with the first call."""
        arguments, compression = self._channel_arguments(), self._compression()
        if self.options.tls is None:
            return grpc.insecure_channel(grpc_target(self.address), arguments, compression)
        credentials = self.options.tls.credentials()
        return grpc.secure_channel(grpc_target(self.address), credentials, arguments, compression)

    def open_aio(self) -> grpc.aio.Channel:
        """Open a channel for asyncio; it connects with the first call."""
        arguments, compression = self._channel_arguments(), self._compression()
        if self.options.tls is None:
            return grpc.aio.insecure_channel(grpc_target(self.address), arguments, compression)
        credentials = self.options.tls.credentials()
        return grpc.aio.secure_channel(
            grpc_target(self.address), credentials, arguments, compression
        )

    def _compression(self) -> grpc.Compression:
        return grpc.Compression.Gzip if self.options.gzip else grpc.Compression.NoCompression

    def _channel_arguments(self) -> list[tuple[str, object]]:
        answer_within_ms = math.ceil(1000 * self.options.keepalive_timeout_s)
        config = {
            "loadBalancingConfig": [{"round_robin": {}}],
            **self.options.retry.method_config(),
        }
        arguments: list[tuple[str, object]] = [
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_send_message_length", self.options.max_message_bytes),
            ("grpc.max_receive_message_length", self.options.max_message_bytes),
            # Reconnect soon after a server was restarted.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # Detect a server that is gone without having closed the connection.
            ("grpc.keepalive_time_ms", math.ceil(1000 * self.options.keepalive_s)),
            ("grpc.keepalive_timeout_ms", answer_within_ms),
            # Without it gRPC waits a minute for the answer, whatever the line above says.
            ("grpc.http2.ping_timeout_ms", answer_within_ms),
            ("grpc.use_local_subchannel_pool", int(self.options.private_connection)),
        ]
        if self.options.tls and self.options.tls.server_name:
            arguments.append(("grpc.ssl_target_name_override", self.options.tls.server_name))
        return arguments


class Lifetime:
    """When a client may be used: until it is closed, and in one process.

    gRPC keeps threads and sockets that a forked child lacks: its calls would hang there.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._closed = False

    def close(self) -> None:
        """End it."""
        self._closed = True

    def check(self) -> None:
        """Check that the client may be used.

        Raises:
            LifetimeError: It was closed, or this process was forked after it was created.
        """
        if self._closed:
            raise LifetimeError("the client is closed")
        if os.getpid() != self._process:
            raise LifetimeError(
                "the client was created before this process was forked; create one in each process"
            )


def check_timeout(timeout_s: float | None) -> float | None:
    """Return a time-out for gRPC: None if there is none or it is infinite.

    Raises:
        UsageError: It is not above 0.
    """
    if timeout_s is None or timeout_s == math.inf:
        return None
    if not timeout_s > 0:
        raise UsageError(f"timeout_s: expected seconds above 0 or None, got {timeout_s:g}")
    return timeout_s


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"TLS: {path}: {error.strerror or 'cannot be read'}") from error
