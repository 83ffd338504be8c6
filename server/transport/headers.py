"""Header blocks: decoding by the hpack library, and what gRPC puts into them."""

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

import hpack

from server.transport.frames import COMPRESSION_ERROR, Http2Error

Metadata = tuple[tuple[str, str | bytes], ...]

_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_BINARY = "-bin"
_MAX_CACHED_BLOCKS = 64
# Callers refuse headers of more than 8 KiB, and a letter may take three bytes.
_MAX_STATUS_LETTERS = 2048
# What gRPC itself speaks of; all other fields are the application's metadata.
_PROTOCOL_FIELDS = frozenset(
    ("content-type", "te", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding")
)
# Printable ASCII but the percent sign stands for itself in grpc-message.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if code != ord("%"))


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What the headers of a call say.

    Attributes:
        path: "/package.Service/Method".
        timeout_s: None where the caller sets none.
        encoding: How compressed messages of the call are compressed.
        metadata: The application's own; fields named …-bin as bytes.
    """

    path: str
    content_type: str
    timeout_s: float | None
    encoding: str
    metadata: Metadata


class HeaderReader:
    """Decodes the header blocks of one connection, which depend on those before.

    A caller that sends request after request repeats its block to the byte. A block of nothing but
    references to the table says the same as long as the table stays, so it is decoded once.

    Args:
        max_bytes: Of one decoded block.
    """

    def __init__(self, max_bytes: int) -> None:
        self._decoder = hpack.Decoder(max_bytes)
        self._known: dict[bytes, RequestHead] = {}

    def read(self, block: bytes) -> RequestHead:
        """Decodes a block.

        Raises:
            Http2Error: It cannot be decoded, so neither can those that follow.
            ValueError: It can, but is no call: the message says why.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        # The high bit of each byte: nothing but indexed fields (RFC 7541, section 6.1).
        changes_nothing = block.translate(None, _HIGH_BYTES) == b""
        if not changes_nothing or len(self._known) >= _MAX_CACHED_BLOCKS:
            self._known.clear()
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise Http2Error(COMPRESSION_ERROR, f"header block: {error}") from error
        head = _request_head(fields)
        if changes_nothing:
            self._known[block] = head
        return head


_HIGH_BYTES = bytes(range(0x80, 0x100))


def header_block(fields: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Returns a block that changes no table: literal fields without indexing, no Huffman code."""
    parts: list[bytes] = []
    for name, value in fields:
        text = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        key = name.encode()
        parts += (b"\0", _length(len(key)), key, _length(len(text)), text)
    return b"".join(parts)


def status_fields(code: int, message: str) -> list[tuple[str, str | bytes]]:
    """Returns the fields that end a call with a status."""
    fields: list[tuple[str, str | bytes]] = [("grpc-status", str(code))]
    if message:
        fields.append(("grpc-message", quote(message[:_MAX_STATUS_LETTERS], safe=_PLAIN)))
    return fields


def _length(number: int) -> bytes:
    """An integer with a prefix of 7 bits (RFC 7541, section 5.1)."""
    if number < 0x7F:
        return bytes((number,))
    rest, coded = number - 0x7F, bytearray((0x7F,))
    while rest >= 0x80:
        coded.append(rest & 0x7F | 0x80)
        rest >>= 7
    coded.append(rest)
    return bytes(coded)


def _request_head(fields: Iterable[tuple[bytes, bytes]]) -> RequestHead:
    known: dict[str, str] = {}
    metadata: list[tuple[str, str | bytes]] = []
    for raw_name, raw_value in fields:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name.startswith(":") or name in _PROTOCOL_FIELDS:
            known[name] = value
        else:
            metadata += _metadata(name, value)
    timeout = known.get("grpc-timeout")
    return RequestHead(
        known.get(":path", ""),
        known.get("content-type", ""),
        None if timeout is None else _seconds(timeout),
        known.get("grpc-encoding", "identity"),
        tuple(metadata),
    )


def _metadata(name: str, value: str) -> list[tuple[str, str | bytes]]:
    if not name.endswith(_BINARY):
        return [(name, value)]
    try:
        return [
            (name, base64.b64decode(part + "=" * (-len(part) % 4), validate=True))
            for part in value.split(",")
        ]
    except binascii.Error as error:
        raise ValueError(f"{name}: expected base64") from error


def _seconds(timeout: str) -> float:
    match = _TIMEOUT.fullmatch(timeout)
    if not match:
        raise ValueError(f"grpc-timeout: expected up to 8 digits and a unit, got {timeout[:16]!r}")
    return int(match[1]) * _UNIT_S[match[2]]
