"""Who may send requests: TLS, mutual TLS, bearer tokens, from files that may change meanwhile."""

import contextlib
import hmac
import ipaddress
import os
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import structlog

from server.errors import StartupError

logger = structlog.get_logger()

# Supervisors and load balancers ask these without a credential.
OPEN_RPCS = "/grpc.health.v1.Health/"
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_SCHEME = "bearer "

_T = TypeVar("_T")
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class AccessFiles:
    """Where credentials lie; None for those that are not asked for.

    Attributes:
        certificate: The server's chain, PEM.
        key: Its private key, PEM.
        client_ca: Who must have signed a client's certificate, PEM.
        token: Bearer tokens, one a line; any of them opens.
        token_flag: What the settings call the last, for messages.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    token: Path | None = None
    token_flag: str = "--token-file"


class Access:
    """Checks callers, and follows its files: what is replaced counts for the next connection.

    A file that cannot be used any more is reported once; what was read before stays in force.

    Raises:
        StartupError: A file cannot be used, or a certificate came without its key.
    """

    def __init__(self, files: AccessFiles) -> None:
        self._files = files
        if bool(files.certificate) != bool(files.key):
            raise StartupError("--tls-certificate and --tls-key: expected both or neither")
        if files.client_ca and not files.certificate:
            raise StartupError("--tls-client-ca: expected --tls-certificate beside it")
        pem = [path for path in (files.certificate, files.key, files.client_ca) if path]
        self._pem = _Followed(pem, self._read_pem, "--tls-certificate") if pem else None
        self._tokens: _Followed[tuple[bytes, ...]] | None = None
        if files.token:
            self._tokens = _Followed(
                [files.token], partial(_read_tokens, files.token), files.token_flag
            )

    @property
    def is_open(self) -> bool:
        """True where anyone who reaches the port may send requests."""
        return self._tokens is None and self._files.client_ca is None

    def warn_if_open(self, host: str) -> None:
        """Logs a warning where a port beyond loopback is open to anybody."""
        if self.is_open and not _is_loopback(host):
            logger.warning(
                "anyone who reaches this address may send requests; "
                "set --token-file or --tls-client-ca",
                host=host,
            )

    def allows_rpc(self, path: str, metadata: Metadata) -> bool:
        """Says whether a call to /SERVICE/METHOD with this metadata may go on."""
        if self._tokens is None or path.startswith(OPEN_RPCS):
            return True
        given = next((value for key, value in metadata if key == "authorization"), "")
        return self._knows(given)

    def allows_http(self, path: str, authorization: str) -> bool:
        """Says whether a request for a path, with this Authorization header, may go on."""
        return self._tokens is None or path in OPEN_PATHS or self._knows(authorization)

    def tls_context(self, protocols: Sequence[str]) -> ssl.SSLContext | None:
        """Returns what encrypts a port that speaks these protocols (ALPN); None without TLS."""
        if self._pem is None:
            return None
        followed = self._pem
        context, made_of = self._context(protocols), followed.value

        def renew(connection: ssl.SSLObject | ssl.SSLSocket, *_: object) -> None:
            nonlocal context, made_of
            if followed.current() is not made_of:
                # A file may change again between the two looks at it; the next handshake sees it.
                with contextlib.suppress(OSError, ValueError):
                    context, made_of = self._context(protocols), followed.value
            connection.context = context

        first = context
        # Called in every handshake, before the certificate is chosen.
        first.sni_callback = renew
        return first

    def grpcio_credentials(self) -> "grpc.ServerCredentials | None":
        """Returns the same for a port of grpcio's; None without TLS."""
        if self._pem is None:
            return None
        followed = self._pem
        told = followed.value

        def configuration() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal told
            if followed.current() is told:
                return None
            told = followed.value
            return _grpcio_configuration(told)

        return grpc.dynamic_ssl_server_credentials(
            _grpcio_configuration(told), configuration, told.client_ca is not None
        )

    def _knows(self, given: str | bytes) -> bool:
        assert self._tokens is not None
        text = given.decode("ascii", "replace") if isinstance(given, bytes) else given
        if text[: len(_SCHEME)].lower() != _SCHEME:
            return False
        token = text[len(_SCHEME) :].strip().encode("utf-8", "replace")
        # All are compared, each in constant time.
        return sum(hmac.compare_digest(token, known) for known in self._tokens.current()) > 0

    def _read_pem(self) -> "_Pem":
        files = self._files
        assert files.certificate
        assert files.key
        pem = _Pem(
            files.certificate.read_bytes(),
            files.key.read_bytes(),
            files.client_ca.read_bytes() if files.client_ca else None,
        )
        # Raises what would otherwise come up in a handshake, such as a key of another certificate.
        self._context(())
        return pem

    def _context(self, protocols: Sequence[str]) -> ssl.SSLContext:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        assert files.certificate
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
        if files.client_ca:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


@dataclass(frozen=True, slots=True)
class _Pem:
    certificate: bytes
    key: bytes
    client_ca: bytes | None


class _Followed(Generic[_T]):
    """What was read from files, read again when one of them changes.

    Attributes:
        value: What was read last; another object after each change.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _T], flag: str) -> None:
        self._paths = paths
        self._read = read
        self._flag = flag
        self._stamps = _stamps(paths)
        try:
            self.value = read()
        except (OSError, ValueError) as error:
            raise StartupError(f"{flag}: {_cause(error)}") from error

    def current(self) -> _T:
        """Returns the value after a look at the files."""
        stamps = _stamps(self._paths)
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self.value = self._read()
                logger.info("credentials read again", setting=self._flag)
            except (OSError, ValueError) as error:
                logger.error(
                    "credentials kept as they were", setting=self._flag, error=_cause(error)
                )
        return self.value


def _stamps(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    stamps = []
    for path in paths:
        try:
            found = os.stat(path)
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            stamps.append((0, 0, 0))
    return stamps


def _read_tokens(path: Path) -> tuple[bytes, ...]:
    tokens = tuple(path.read_bytes().split())
    if not tokens:
        raise ValueError("expected a token, found none")
    return tokens


def _grpcio_configuration(pem: _Pem) -> "grpc.ServerCertificateConfiguration":
    return grpc.ssl_server_certificate_configuration(
        [(pem.key, pem.certificate)], root_certificates=pem.client_ca
    )


def _no_password() -> str:
    # OpenSSL would otherwise ask for one on the terminal.
    raise ValueError("expected a key that is not encrypted")


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"expected PEM files that belong together ({error.reason or 'not readable'})"
    if isinstance(error, OSError):
        return f"{str(error.filename)!r}: {error.strerror}"
    return str(error)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
