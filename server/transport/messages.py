"""gRPC's messages: a flag byte, four bytes of length, then the message, in a stream of bytes."""

import struct
import zlib
from collections.abc import Iterator

import grpc

_PREFIX = struct.Struct(">BL")
# What zlib calls the formats of RFC 1952 and RFC 1950.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


class MessageError(Exception):
    """A caller's bytes are no message; ends the call.

    Attributes:
        code: The status to end it with.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class MessageReader:
    """Takes a call's bytes as they come and gives its messages.

    Args:
        encoding: How those with the flag set are compressed.
        max_bytes: Of one message, before and after decompression.
    """

    __slots__ = ("_encoding", "_max_bytes", "_rest")

    def __init__(self, encoding: str, max_bytes: int) -> None:
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._rest = bytearray()

    @property
    def midway(self) -> bool:
        """True after a part of a message."""
        return bool(self._rest)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes bytes and yields the messages that they complete.

        Raises:
            MessageError: A message is too large or compressed in a way that is not known.
        """
        if not self._rest and len(data) >= _PREFIX.size:
            flag, size = _PREFIX.unpack_from(data)
            if size == len(data) - _PREFIX.size:
                # One frame, one message: nothing to join.
                yield self._unpacked(flag, size, data[_PREFIX.size :])
                return
        self._rest += data
        while len(self._rest) >= _PREFIX.size:
            flag, size = _PREFIX.unpack_from(self._rest)
            self._check_size(size)
            end = _PREFIX.size + size
            if len(self._rest) < end:
                return
            message = bytes(self._rest[_PREFIX.size : end])
            del self._rest[:end]
            yield self._unpacked(flag, size, message)

    def _unpacked(self, flag: int, size: int, message: bytes) -> bytes:
        self._check_size(size)
        return message if flag == 0 else self._decompressed(message)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise MessageError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Received message larger than max ({size} vs. {self._max_bytes})",
            )

    def _decompressed(self, message: bytes) -> bytes:
        bits = _WINDOW_BITS.get(self._encoding)
        if bits is None:
            raise MessageError(
                grpc.StatusCode.UNIMPLEMENTED,
                f"grpc-encoding: expected gzip or deflate, got {self._encoding!r}",
            )
        inflate = zlib.decompressobj(bits)
        try:
            plain = inflate.decompress(message, self._max_bytes + 1)
        except zlib.error as error:
            raise MessageError(
                grpc.StatusCode.INTERNAL, f"message: expected {self._encoding}: {error}"
            ) from error
        self._check_size(len(plain))
        return plain


def framed(message: bytes) -> bytes:
    """Returns a message as it is sent, uncompressed."""
    return _PREFIX.pack(0, len(message)) + message
