"""Frames of HTTP/2, as RFC 9113 lays them out in sections 4 and 6."""

import struct
from collections.abc import Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Length in 24 bits (high 8, low 16), type, flags, stream.
HEADER = struct.Struct(">BHBBL")
STREAM_MASK = 0x7FFF_FFFF
LARGEST_WINDOW = 0x7FFF_FFFF
DEFAULT_WINDOW_BYTES = 65_535
DEFAULT_FRAME_BYTES = 16_384

DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
HAS_PRIORITY = 0x20

MAX_CONCURRENT_STREAMS = 0x3
INITIAL_WINDOW_SIZE = 0x4
MAX_FRAME_SIZE = 0x5
MAX_HEADER_LIST_SIZE = 0x6

NO_ERROR = 0x0
PROTOCOL_ERROR = 0x1
FLOW_CONTROL_ERROR = 0x3
FRAME_SIZE_ERROR = 0x6
REFUSED_STREAM = 0x7
CANCEL = 0x8
COMPRESSION_ERROR = 0x9
ENHANCE_YOUR_CALM = 0xB

_SETTING = struct.Struct(">HL")
_WORD = struct.Struct(">L")


class Http2Error(Exception):
    """The peer broke the protocol in a way that ends the connection.

    Attributes:
        code: For the GOAWAY frame.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class FrameReader:
    """Takes the bytes of one peer as they come and gives their frames.

    Args:
        max_bytes: Of one frame's payload.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._greeted = False

    def read(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Yields kind, flags, stream and payload of each frame that the bytes complete.

        Raises:
            Http2Error: They are not HTTP/2, or a frame is too large.
        """
        buffer = self._rest + data if self._rest else data
        position, size = 0, len(buffer)
        if not self._greeted:
            if not PREFACE.startswith(buffer[: len(PREFACE)]):
                raise Http2Error(PROTOCOL_ERROR, "expected HTTP/2's preface")
            if size < len(PREFACE):
                self._rest = buffer
                return
            self._greeted = True
            position = len(PREFACE)
        while size - position >= HEADER.size:
            high, low, kind, flags, stream_id = HEADER.unpack_from(buffer, position)
            length = high << 16 | low
            if length > self._max_bytes:
                raise Http2Error(FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            start = position + HEADER.size
            if size - start < length:
                break
            position = start + length
            yield kind, flags, stream_id & STREAM_MASK, buffer[start:position]
        self._rest = buffer[position:]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Returns a frame."""
    size = len(payload)
    return HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    """Returns a SETTINGS frame."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


def read_settings(payload: bytes) -> dict[int, int]:
    """Returns what a SETTINGS frame says.

    Raises:
        Http2Error: Its size is not that of whole settings, or a value is out of range.
    """
    if len(payload) % _SETTING.size:
        raise Http2Error(FRAME_SIZE_ERROR, "SETTINGS: expected whole settings")
    values = dict(_SETTING.iter_unpack(payload))
    if values.get(INITIAL_WINDOW_SIZE, 0) > LARGEST_WINDOW:
        raise Http2Error(FLOW_CONTROL_ERROR, "SETTINGS: initial window size out of range")
    if not DEFAULT_FRAME_BYTES <= values.get(MAX_FRAME_SIZE, DEFAULT_FRAME_BYTES) < 1 << 24:
        raise Http2Error(PROTOCOL_ERROR, "SETTINGS: maximum frame size out of range")
    return values


def window_update(stream_id: int, increment: int) -> bytes:
    """Returns a WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, _WORD.pack(increment))


def rst_stream(stream_id: int, code: int) -> bytes:
    """Returns a RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, _WORD.pack(code))


def goaway(last_stream_id: int, code: int, text: str = "") -> bytes:
    """Returns a GOAWAY frame: streams above the last one were not and will not be looked at."""
    payload = _WORD.pack(last_stream_id) + _WORD.pack(code) + text.encode()
    return frame(GOAWAY, 0, 0, payload)


def read_word(payload: bytes) -> int:
    """Returns the 31 bits that WINDOW_UPDATE and RST_STREAM consist of.

    Raises:
        Http2Error: The payload has another size.
    """
    if len(payload) != _WORD.size:
        raise Http2Error(FRAME_SIZE_ERROR, f"expected 4 bytes of payload, got {len(payload)}")
    (word,) = _WORD.unpack(payload)
    return int(word) & STREAM_MASK


def without_padding(flags: int, payload: bytes) -> bytes:
    """Returns the payload of a DATA or HEADERS frame without its padding.

    Raises:
        Http2Error: There is more padding than payload.
    """
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Http2Error(PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]
