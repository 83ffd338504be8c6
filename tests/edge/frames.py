"""An HTTP/2 client that sends exactly the frames that a test asks for, valid or not.

`hyperframe` reads the server's frames, `hpack` decodes its header blocks. Frames to the server are
written here byte by byte, because both libraries reject invalid ones.
"""

import contextlib
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import hpack
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TIMEOUT_S = 60.0
_LATER_CALLS = 20
MAX_WINDOW_BYTES = 2**31 - 1
DEFAULT_WINDOW_BYTES = 65_535
DEFAULT_FRAME_BYTES = 16_384

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY = range(8)
WINDOW_UPDATE, CONTINUATION = 8, 9
NO_FLAGS, END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0, 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4
MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 5, 6

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
EMPTY_MESSAGE = bytes(5)
INFERENCE = "/inference.GRPCInferenceService"

Fields = list[tuple[str, str]]


class ErrorCode(IntEnum):
    """Why a stream or a connection ended (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return a frame as it is on the wire; nothing is checked."""
    length = len(payload)
    return struct.pack(">BHBBL", length >> 16, length & 0xFFFF, kind, flags, stream_id) + payload


def settings(values: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HL", *item) for item in values.items()))


def window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, struct.pack(">L", increment))


def rst_stream(stream_id: int, code: int = ErrorCode.CANCEL) -> bytes:
    """Return an RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, struct.pack(">L", code))


def header_frames(stream_id: int, block: bytes, max_bytes: int, flags: int = END_HEADERS) -> bytes:
    """Return a header block in frames of at most so many bytes."""
    parts = [block[start : start + max_bytes] for start in range(0, len(block), max_bytes)]
    if len(parts) < 2:
        return frame(HEADERS, flags, stream_id, block)
    middle = [frame(CONTINUATION, 0, stream_id, part) for part in parts[1:-1]]
    return b"".join(
        [
            frame(HEADERS, flags & ~END_HEADERS, stream_id, parts[0]),
            *middle,
            frame(CONTINUATION, END_HEADERS, stream_id, parts[-1]),
        ]
    )


def message(content: bytes = b"", flag: int = 0) -> bytes:
    """Return a gRPC message as it is in DATA frames."""
    return struct.pack(">BL", flag, len(content)) + content


def request_fields(path: str = CHECK, **changes: str | None) -> Fields:
    """Return the header fields of a gRPC call.

    Args:
        changes: Fields by name, `_` for `-` and a leading `_` for `:`; None leaves one out, an
            unknown name adds one.
    """
    fields: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    for name, value in changes.items():
        fields[(":" if name.startswith("_") else "") + name.strip("_").replace("_", "-")] = value
    return [(name, value) for name, value in fields.items() if value is not None]


def literal_block(fields: Iterable[tuple[str | bytes, str | bytes]]) -> bytes:
    """Return a header block of literals without indexing, each byte as given."""
    block = bytearray()
    for pair in fields:
        block.append(0)
        for part in pair:
            octets = part if isinstance(part, bytes) else part.encode()
            length = hpack.hpack.encode_integer(len(octets), 7)
            block += length + octets
    return bytes(block)


# A reflection request whose reply takes some kilobytes.
DESCRIBE = message(
    ServerReflectionRequest(
        file_containing_symbol="inference.GRPCInferenceService"
    ).SerializeToString()
)


@dataclass
class Reply:
    """What came back on a stream.

    Attributes:
        blocks: The fields of each header block, in order.
        data: What the DATA frames carried.
        data_sizes: Of each DATA frame, in bytes.
        reset: The code of the RST_STREAM frame.
    """

    blocks: list[Fields] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    data_sizes: list[int] = field(default_factory=list)
    ended: bool = False
    reset: int | None = None

    def get(self, name: str) -> str | None:
        """Return a header field or trailer; of several the last."""
        return {name: value for block in self.blocks for name, value in block}.get(name)

    def __str__(self) -> str:
        status = self.get(":status")
        if status is None:
            return "no response"
        if status != "200" or self.get("grpc-status") is None:
            return f"HTTP {status}"
        return f"grpc-status {self.get('grpc-status')}"


class Http2Client:
    """One connection to a server.

    Example:
        with Http2Client.connect(server.address) as client:
            stream_id = client.call(CHECK, EMPTY_MESSAGE)
            assert client.outcome(stream_id) == "grpc-status 0"

    Attributes:
        address: Of the server, HOST:PORT.
        replies: By stream.
        server_settings: What the server announced so far.
        frames: Every frame that the server sent, in order.
        goaways: Those among them that announce the end of the connection.
        closed: The server closed the connection.
    """

    def __init__(self, connection: socket.socket, address: str) -> None:
        self.address = address
        self.replies: dict[int, Reply] = {}
        self.server_settings: dict[int, int] = {}
        self.frames: list[Frame] = []
        self.goaways: list[GoAwayFrame] = []
        self.closed = False
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self._socket = connection
        self._next_stream_id = 1
        self._block = bytearray()
        self._ends = False
        # By stream, 0 for the connection: what WINDOW_UPDATE granted less what was sent.
        self._credit: dict[int, int] = {}
        self._pongs: set[bytes] = set()
        self._pings = 0

    @classmethod
    @contextlib.contextmanager
    def connect(
        cls, address: str, values: Mapping[int, int] | None = None, greet: bool = True
    ) -> "Iterator[Http2Client]":
        """Connects, and exchanges preface and settings unless greeting is off."""
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = cls(connection, address)
            if greet:
                client.send(PREFACE + settings(values or {}))
                client.wait(lambda: client.acknowledged == 1)
            yield client

    def set(self, values: Mapping[int, int]) -> bool:
        """Change settings and wait until the server acknowledged them."""
        before = self.acknowledged
        self.send(settings(values))
        return self.wait(lambda: self.acknowledged > before)

    @property
    def acknowledged(self) -> int:
        """How many of this side's SETTINGS frames the server acknowledged."""
        return sum(isinstance(each, SettingsFrame) and "ACK" in each.flags for each in self.frames)

    def send(self, *frames: bytes) -> None:
        """Send bytes in one write; reading detects a server that is gone."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(b"".join(frames))

    def new_stream(self) -> int:
        """Return the next free stream identifier."""
        stream_id, self._next_stream_id = self._next_stream_id, self._next_stream_id + 2
        return stream_id

    def headers(
        self, stream_id: int, fields: Iterable[tuple[str, str]], flags: int = END_HEADERS
    ) -> None:
        """Send fields in one HEADERS frame, or more frames where one would be too large."""
        self._next_stream_id = max(self._next_stream_id, stream_id + stream_id % 2 + 1)
        block = self.encoder.encode(list(fields))
        self.send(header_frames(stream_id, block, DEFAULT_FRAME_BYTES, flags))

    def open(self, path: str = CHECK, **changes: str | None) -> int:
        """Begin a call, leaves its stream open and return it."""
        stream_id = self.new_stream()
        self.headers(stream_id, request_fields(path, **changes))
        return stream_id

    def data(
        self, stream_id: int, content: bytes = b"", end: bool = False, padding: int | None = None
    ) -> None:
        """Send one DATA frame, padded by so many bytes unless that is None."""
        flags = END_STREAM if end else 0
        if padding is not None:
            flags |= PADDED
            content = bytes([padding]) + content + bytes(padding)
        for each in (0, stream_id):
            self._credit[each] = self._credit.get(each, 0) - len(content)
        self.send(frame(DATA, flags, stream_id, content))

    def room(self, stream_id: int) -> int:
        """Return how many bytes the windows of a stream and of the connection have left."""
        initial = self.server_settings.get(INITIAL_WINDOW_SIZE, DEFAULT_WINDOW_BYTES)
        stream = initial + self._credit.get(stream_id, 0)
        return min(stream, DEFAULT_WINDOW_BYTES + self._credit.get(0, 0))

    def call(self, path: str = CHECK, body: bytes = EMPTY_MESSAGE, **changes: str | None) -> int:
        """Send a whole request and return its stream."""
        stream_id = self.open(path, **changes)
        self.data(stream_id, body, end=True)
        return stream_id

    def reply(self, stream_id: int) -> Reply:
        """Return what came back on a stream so far."""
        return self.replies.setdefault(stream_id, Reply())

    def wait(self, done: Callable[[], object]) -> bool:
        """Read until something holds or the connection ends; return whether it holds.

        Raises:
            TimeoutError: The server sent nothing for TIMEOUT_S.
        """
        while not done() and not self.closed:
            self._read_frame()
        return bool(done())

    def ended(self, stream_id: int) -> bool:
        """Tell whether the server ended a stream, by a whole reply or a reset."""
        reply = self.reply(stream_id)
        return reply.ended or reply.reset is not None

    def answer(self, stream_id: int) -> Reply:
        """Wait for the end of a stream and return what came back on it."""
        self.wait(lambda: self.ended(stream_id))
        return self.reply(stream_id)

    def ping(self) -> bool:
        """Wait until the server answers a PING, which it does after all that came before it."""
        self._pings += 1
        payload = struct.pack(">Q", self._pings)
        self.send(frame(PING, 0, 0, payload))
        return self.wait(lambda: payload in self._pongs)

    def works(self) -> bool:
        """Tell whether the connection still serves a call."""
        return str(self.answer(self.call())) == "grpc-status 0"

    def outcome(self, stream_id: int = 0) -> str:
        """Return how the server reacts, once it has: what ended the stream or the connection.

        A PING is answered after all that came before it, and a call afterwards takes the way of
        errors that the server finds beyond its frames. Calls may overtake each other, so a stream
        has the time of some more to end.

        Returns:
            "GOAWAY code" or "closed" for the connection; "RST_STREAM code", "grpc-status number"
            or "HTTP status" for the stream; "ignored" where neither ended.
        """
        if self.ping() and self.answer(self.call()) and self.ping():
            for _ in range(_LATER_CALLS):
                if self.goaways or not stream_id or self.ended(stream_id):
                    break
                self.answer(self.call())
            if self.goaways:
                self.wait(lambda: self.closed)
            elif stream_id and self.ended(stream_id):
                return self.stream_outcome(stream_id)
            else:
                return "ignored"
        if self.goaways:
            return f"GOAWAY {ErrorCode(self.goaways[-1].error_code).name}"
        return "closed"

    def stream_outcome(self, stream_id: int) -> str:
        """Wait for the end of a stream; return it in the words of `outcome`."""
        reply = self.answer(stream_id)
        if reply.reset:
            return f"RST_STREAM {ErrorCode(reply.reset).name}"
        if reply.ended:
            return str(reply)
        if reply.reset is not None:
            return f"RST_STREAM {ErrorCode.NO_ERROR.name}"
        return self.outcome()

    def status_line(self) -> str:
        """Return version and status if the server answers in HTTP/1.1; read nothing else."""
        if self._socket.recv(5, socket.MSG_PEEK | socket.MSG_WAITALL) != b"HTTP/":
            return ""
        return self._read(len("HTTP/1.1 200")).decode()

    def _read_frame(self) -> None:
        head = self._read(9)
        if len(head) < 9:
            self.closed = True
            return
        each, length = Frame.parse_frame_header(memoryview(head))
        each.parse_body(memoryview(self._read(length)))
        self.frames.append(each)
        self._take(each)

    def _take(self, each: Frame) -> None:
        if isinstance(each, SettingsFrame) and "ACK" not in each.flags:
            self.server_settings |= each.settings
            self.send(frame(SETTINGS, ACK, 0))
        elif isinstance(each, PingFrame):
            if "ACK" in each.flags:
                self._pongs.add(each.opaque_data)
            else:
                self.send(frame(PING, ACK, 0, each.opaque_data))
        elif isinstance(each, GoAwayFrame):
            self.goaways.append(each)
        elif isinstance(each, RstStreamFrame):
            reply = self.reply(each.stream_id)
            reply.reset = each.error_code if reply.reset is None else reply.reset
        elif isinstance(each, WindowUpdateFrame):
            credit = self._credit.get(each.stream_id, 0)
            self._credit[each.stream_id] = credit + each.window_increment
        elif isinstance(each, DataFrame):
            reply = self.reply(each.stream_id)
            reply.data += each.data
            reply.data_sizes.append(each.flow_controlled_length)
            reply.ended = reply.ended or "END_STREAM" in each.flags
        elif isinstance(each, HeadersFrame | ContinuationFrame):
            self._take_headers(each)

    def _take_headers(self, each: HeadersFrame | ContinuationFrame) -> None:
        reply = self.reply(each.stream_id)
        self._block += each.data
        if isinstance(each, HeadersFrame):
            self._ends = "END_STREAM" in each.flags
        if "END_HEADERS" in each.flags:
            reply.blocks.append(
                [(str(k), str(v)) for k, v in self.decoder.decode(bytes(self._block))]
            )
            self._block.clear()
            reply.ended = reply.ended or self._ends

    def _read(self, size: int) -> bytes:
        octets = bytearray()
        while len(octets) < size:
            try:
                part = self._socket.recv(size - len(octets))
            except ConnectionResetError:
                return b""
            if not part:
                return b""
            octets += part
        return bytes(octets)
