"""Bearer tokens (RFC 6750), read from a file that may be replaced at run time."""

import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from convoy.server.security.tls import FollowedFiles

logger = structlog.get_logger()

_SCHEME = b"bearer "


@dataclass(frozen=True, slots=True)
class _Token:
    """A token.

    Attributes:
        name: Who has it, for the log.
    """

    token: bytes
    name: str


def _count_nothing() -> None:
    """Count nothing."""


class Tokens:
    """Check the Authorization header of requests.

    Args:
        path: File with one token per line, or a name and a token; each token is accepted. None
            accepts every request.
        flag: The setting that names the file, for messages.
        on_rejected: Called for each request that is not accepted.

    Raises:
        StartupError: The file cannot be read, holds no token, or has a line of three words.
    """

    def __init__(
        self,
        path: Path | None,
        flag: str = "--token-file",
        on_rejected: Callable[[], None] = _count_nothing,
    ) -> None:
        self._tokens = FollowedFiles([path], partial(_read, path), flag) if path else None
        self._on_rejected = on_rejected

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return self._tokens is not None

    def accept(self, authorization: bytes) -> bool:
        """Return whether this Authorization header (empty without one) is allowed."""
        if self._tokens is None:
            return True
        accepted = bool(_names(self._tokens.current(), authorization))
        if not accepted:
            self._on_rejected()
        return accepted

    def name_of(self, authorization: bytes) -> str:
        """Return the name of the token in an Authorization header that was accepted, for the log.

        Without a name in the file it is the token's place there, such as "token 2".
        """
        return next(iter(_names(self._tokens.current(), authorization)), "") if self._tokens else ""

    def reload(self) -> None:
        """Read the file again, whether or not it changed."""
        if self._tokens:
            self._tokens.reload()


def warn_if_open(host: str, tokens: Tokens, mutual_tls: bool) -> None:
    """Log a warning if a port beyond loopback accepts requests from anyone."""
    if not tokens.required and not mutual_tls and not _is_loopback(host):
        logger.warning(
            "anyone who reaches this address may send requests; "
            "set --token-file or --tls-client-ca",
            host=host,
        )


def _names(tokens: tuple[_Token, ...], authorization: bytes) -> list[str]:
    """Return the names of the tokens that equal the one in the header."""
    if authorization[: len(_SCHEME)].lower() != _SCHEME:
        return []
    given = authorization[len(_SCHEME) :].strip()
    # All tokens are compared, each in constant time.
    matches = [hmac.compare_digest(given, known.token) for known in tokens]
    return [known.name for known, match in zip(tokens, matches, strict=True) if match]


def _read(path: Path) -> tuple[_Token, ...]:
    lines = [line.split() for line in path.read_bytes().splitlines()]
    tokens = []
    for number, words in enumerate(lines, 1):
        match words:
            case []:
                continue
            case [token]:
                tokens.append(_Token(token, f"token {number}"))
            case [name, token]:
                tokens.append(_Token(token, name.decode("utf-8", "replace")))
            case _:
                raise ValueError(
                    f"line {number}: expected a token, or a name and a token, "
                    f"got {len(words)} words"
                )
    if not tokens:
        raise ValueError("expected a token, found none")
    return tuple(tokens)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
