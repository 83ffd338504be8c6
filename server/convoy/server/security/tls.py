"""TLS and mutual TLS from PEM files, which are read again when they are replaced."""

import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import structlog

from convoy.server.errors import StartupError

logger = structlog.get_logger()

_T = TypeVar("_T")


class FollowedFiles(Generic[_T]):
    """Hold the content of files, and read them again when one of them changes.

    If a changed file is unusable, the error is logged once and the previous content remains valid.

    Args:
        paths: The files.
        read: Reads and checks them; raises OSError or ValueError if they cannot be used.
        flag: The setting that names them, for messages.

    Attributes:
        value: What was read last; the same object as long as it is equal.

    Raises:
        StartupError: The files cannot be used.
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
        """Return the value, after a check whether the files changed."""
        stamps = _stamps(self._paths)
        if stamps != self._stamps:
            self.reload()
        return self.value

    def reload(self) -> None:
        """Read the files again, whether or not they changed."""
        self._stamps = _stamps(self._paths)
        try:
            value = self._read()
        except (OSError, ValueError, StartupError) as error:
            logger.error(
                "credentials cannot be used; the previous ones remain",
                setting=self._flag,
                error=_cause(error),
            )
            return
        if value != self.value:
            self.value = value
        logger.info("credentials read again", setting=self._flag)


def _stamps(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    stamps = []
    for path in paths:
        try:
            found = os.stat(path)
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            stamps.append((0, 0, 0))
    return stamps


def _cause(error: Exception) -> str:
    # ssl.SSLError is an OSError without a file name.
    if isinstance(error, OSError) and error.filename:
        return f"{str(error.filename)!r}: {error.strerror}"
    return str(error)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of a port.

    Attributes:
        certificate: The server's certificate chain.
        key: Its private key.
        client_ca: The authority that must have signed clients' certificates; None: not required.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """The content of `TlsFiles`, checked: the key belongs to the certificate."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class Tls:
    """The certificates of a port, which follow their files.

    Raises:
        StartupError: A file cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        paths = [path for path in (files.certificate, files.key, files.client_ca) if path]
        self._followed = FollowedFiles(paths, self._read, "--tls-certificate")

    def current(self) -> TlsMaterial:
        """Return the certificates in force; a different object after each change of the files."""
        return self._followed.current()

    def reload(self) -> None:
        """Read the files again, whether or not they changed."""
        self._followed.reload()

    def grpcio_credentials(self) -> "grpc.ServerCredentials":
        """Return credentials for a port of grpcio, which follow the files too."""
        known = self.current()

        def changed() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal known
            current = self.current()
            if current is known:
                return None
            known = current
            return _grpcio_configuration(current)

        return grpc.dynamic_ssl_server_credentials(
            _grpcio_configuration(known), changed, known.client_ca is not None
        )

    def _read(self) -> TlsMaterial:
        files = self.files
        material = TlsMaterial(
            files.certificate.read_bytes(),
            files.key.read_bytes(),
            files.client_ca.read_bytes() if files.client_ca else None,
        )
        _check(files)
        return material


def open_tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    """Return the TLS of the settings; None for plain text.

    Raises:
        StartupError: A file cannot be used, or one is missing that belongs to another.
    """
    if certificate and key:
        return Tls(TlsFiles(certificate, key, client_ca))
    if certificate or key:
        raise StartupError("--tls-certificate and --tls-key: expected both or neither")
    if client_ca:
        raise StartupError("--tls-client-ca: expected also --tls-certificate")
    return None


def _check(files: TlsFiles) -> None:
    """Raise for errors that would fail every handshake, such as a key of another certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
        if files.client_ca:
            context.load_verify_locations(files.client_ca)
    except ssl.SSLError as error:
        reason = error.reason or "not readable"
        raise ValueError(f"expected PEM files that belong together ({reason})") from error


def _grpcio_configuration(material: TlsMaterial) -> "grpc.ServerCertificateConfiguration":
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.client_ca
    )


def _no_password() -> str:
    # OpenSSL would otherwise ask for one on the terminal.
    raise ValueError("expected a key that is not encrypted")
