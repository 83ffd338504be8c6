"""Peers that speak HTTP/2 badly, or well but rarely so."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.transport import GrpcServer, TransportLimits, frames
from server.transport.frames import HEADER, PREFACE, frame
from server.transport.headers import HeaderReader, header_block


def head(method: str = "Unary", content_type: str = "application/grpc") -> bytes:
    return header_block(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/test.Echo/{method}"),
            (":authority", "here"),
            ("content-type", content_type),
            ("te", "trailers"),
        ]
    )


REQUEST = head()
MESSAGE = b"\0\0\0\0\5hello"
HELLO = PREFACE + frames.settings({})
ENDS = frames.END_HEADERS | frames.END_STREAM


class Peer:
    """A connection of which a test writes every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._decoder = hpack.Decoder()

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def frame(self, *kinds: int) -> tuple[int, int, int, bytes]:
        """The next frame of one of these kinds: kind, flags, stream, payload."""
        while True:
            high, low, kind, flags, stream = HEADER.unpack(
                await asyncio.wait_for(self.reader.readexactly(HEADER.size), 10)
            )
            payload = await self.reader.readexactly(high << 16 | low)
            if kind in kinds:
                return kind, flags, stream, payload

    async def answer(self, stream: int) -> tuple[dict[str, str], bytes]:
        """All headers and data of a stream."""
        fields, data = {}, b""
        while True:
            kind, flags, number, payload = await self.frame(frames.HEADERS, frames.DATA)
            assert number == stream
            if kind == frames.DATA:
                data += payload
            else:
                fields.update(self._decoder.decode(payload))
            if flags & frames.END_STREAM:
                return fields, data

    async def goaway(self) -> int:
        """The code of the GOAWAY frame that ends the connection."""
        payload = (await self.frame(frames.GOAWAY))[3]
        await asyncio.wait_for(self.reader.read(), 10)
        return struct.unpack_from(">L", payload, 4)[0]


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


def call(stream: int = 1, message: bytes = MESSAGE) -> bytes:
    return frame(frames.HEADERS, frames.END_HEADERS, stream, REQUEST) + frame(
        frames.DATA, frames.END_STREAM, stream, message
    )


async def check_alive(port: int) -> None:
    async with connected(port) as peer:
        peer.send(HELLO, call())
        assert (await peer.answer(1))[0]["grpc-status"] == "0"


async def test_a_call_byte_by_byte(port):
    async with connected(port) as peer:
        for byte in HELLO + call():
            peer.send(bytes([byte]))
            await peer.writer.drain()
        fields, data = await peer.answer(1)
    assert (fields[":status"], fields["content-type"]) == ("200", "application/grpc")
    assert (data, fields["grpc-status"]) == (MESSAGE, "0")


async def test_padding_priority_continuation_and_trailers(port):
    opening = frame(
        frames.HEADERS,
        frames.PADDED | frames.HAS_PRIORITY,
        1,
        b"\3" + bytes(5) + REQUEST[:20] + bytes(3),
    )
    rest = [frame(frames.CONTINUATION, 0, 1, REQUEST[20:40])]
    rest.append(frame(frames.CONTINUATION, frames.END_HEADERS, 1, REQUEST[40:]))
    data = frame(frames.DATA, frames.PADDED, 1, b"\2" + MESSAGE + bytes(2))
    trailers = frame(frames.HEADERS, ENDS, 1, header_block([("last", "words")]))
    unknown = frame(0x42, 0, 1, b"whatever") + frame(frames.PRIORITY, 0, 1, bytes(5))
    async with connected(port) as peer:
        peer.send(HELLO, opening, *rest, data, unknown, trailers)
        fields, data = await peer.answer(1)
    assert (fields["grpc-status"], data) == ("0", MESSAGE)


async def test_a_ping_is_answered_and_settings_are_acknowledged(port):
    async with connected(port) as peer:
        peer.send(HELLO, frame(frames.PING, 0, 0, b"12345678"))
        assert (await peer.frame(frames.SETTINGS))[1] == 0
        assert (await peer.frame(frames.SETTINGS))[1] == frames.ACK
        assert (await peer.frame(frames.PING))[1:] == (frames.ACK, 0, b"12345678")


async def test_a_reply_waits_for_the_peers_windows(port):
    message = b"\0" + struct.pack(">L", 90_000) + bytes(90_000)
    pieces = [message[start : start + 16_384] for start in range(0, len(message), 16_384)]
    request = frame(frames.HEADERS, frames.END_HEADERS, 1, REQUEST)
    request += b"".join(frame(frames.DATA, 0, 1, piece) for piece in pieces)
    async with connected(port) as peer:
        peer.send(PREFACE, frames.settings({frames.INITIAL_WINDOW_SIZE: 10_000}), request)
        peer.send(frame(frames.DATA, frames.END_STREAM, 1))
        await peer.frame(frames.HEADERS)
        received = (await peer.frame(frames.DATA))[3]
        assert len(received) == 10_000
        while len(received) < len(message):
            peer.send(frames.window_update(1, 7_000), frames.window_update(0, 7_000))
            received += (await peer.frame(frames.DATA))[3]
        assert received == message
        assert (await peer.frame(frames.HEADERS))[1] & frames.END_STREAM


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(24), frames.PROTOCOL_ERROR),
        (HELLO + frame(frames.DATA, 0, 1, b"x"), frames.PROTOCOL_ERROR),
        (HELLO + frame(frames.HEADERS, ENDS, 2, REQUEST), frames.PROTOCOL_ERROR),
        (HELLO + call(5) + frame(frames.HEADERS, ENDS, 3, REQUEST), frames.PROTOCOL_ERROR),
        (HELLO + frame(frames.HEADERS, ENDS, 1, b"\xff\xff\xff"), frames.COMPRESSION_ERROR),
        (HELLO + frame(frames.HEADERS, 0, 1, REQUEST) + call(3), frames.PROTOCOL_ERROR),
        (HELLO + frame(frames.CONTINUATION, 0, 1, REQUEST), frames.PROTOCOL_ERROR),
        (HELLO + frame(frames.PUSH_PROMISE, 0, 1, bytes(4)), frames.PROTOCOL_ERROR),
        (HELLO + frame(frames.PING, 0, 0, b"1234"), frames.FRAME_SIZE_ERROR),
        (HELLO + frame(frames.SETTINGS, 0, 0, b"1234"), frames.FRAME_SIZE_ERROR),
        (HELLO + frames.settings({frames.MAX_FRAME_SIZE: 1}), frames.PROTOCOL_ERROR),
        (HELLO + frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31}), 3),
        (HELLO + frames.window_update(0, 0), frames.PROTOCOL_ERROR),
        (HELLO + frames.window_update(0, 0x7FFF_FFFF), frames.FLOW_CONTROL_ERROR),
        (HELLO + frame(frames.RST_STREAM, 0, 7, bytes(4)), frames.PROTOCOL_ERROR),
        (HELLO + HEADER.pack(3, 0, frames.DATA, 0, 1), frames.FRAME_SIZE_ERROR),
        (HELLO + frame(frames.DATA, frames.PADDED, 1, b"\xff"), frames.PROTOCOL_ERROR),
    ],
)
async def test_a_broken_protocol_ends_the_connection_with_its_code(port, sent, code):
    async with connected(port) as peer:
        peer.send(sent)
        assert await peer.goaway() == code
    await check_alive(port)


async def test_a_header_block_without_end_is_stopped(port):
    block = header_block([("x", "y" * 10_000)])
    async with connected(port) as peer:
        peer.send(HELLO, frame(frames.HEADERS, 0, 1, block))
        for _ in range(5):
            peer.send(frame(frames.CONTINUATION, 0, 1, block))
        assert await peer.goaway() == frames.ENHANCE_YOUR_CALM


async def test_headers_that_unpack_to_too_much_are_stopped(port):
    # One long field in the table, then thousands of one-byte references to it (a "header bomb").
    field = b"\x40\x01x" + b"\x7f\xe1\x1e" + b"y" * 4000
    async with connected(port) as peer:
        peer.send(HELLO, frame(frames.HEADERS, ENDS, 1, field + b"\xbe" * 8000))
        assert await peer.goaway() == frames.COMPRESSION_ERROR


async def test_a_peer_that_ignores_a_streams_window_is_stopped(port):
    opening = frame(frames.HEADERS, frames.END_HEADERS, 1, head("Both"))
    # Complete messages that nobody reads: the handler waits for its first reply to be taken.
    piece = frame(frames.DATA, 0, 1, (b"\0" + struct.pack(">L", 10_000) + bytes(10_000)) * 10)
    async with connected(port) as peer:
        peer.send(PREFACE, frames.settings({frames.INITIAL_WINDOW_SIZE: 0}), opening)
        for _ in range(TransportLimits().stream_window_bytes // len(piece) + 1):
            peer.send(piece)
        assert await peer.goaway() == frames.FLOW_CONTROL_ERROR


async def test_what_is_no_grpc_is_told_so(port):
    plain = head(content_type="application/json")
    async with connected(port) as peer:
        peer.send(HELLO, frame(frames.HEADERS, ENDS, 1, plain))
        assert (await peer.answer(1))[0] == {":status": "415"}
        peer.send(frame(frames.PING, 0, 0, b"12345678"))
        # Nothing more is said on the stream that has ended.
        assert (await peer.frame(frames.PING, frames.HEADERS))[0] == frames.PING


async def test_a_call_without_a_message_is_refused(port):
    async with connected(port) as peer:
        peer.send(HELLO, frame(frames.HEADERS, ENDS, 1, REQUEST))
        assert (await peer.answer(1))[0]["grpc-status"] == "12"
        peer.send(call(3, MESSAGE * 2))
        assert (await peer.answer(3))[0]["grpc-status"] == "12"


class TestRapidReset:
    @pytest.fixture
    def limits(self):
        return TransportLimits(max_calls=10)

    async def test_calls_that_are_ending_leave_room_for_as_many_again(self, port, echo):
        """A call is over for the peer, which opens another, before it is for its handler."""
        opened = range(1, 43, 2)
        async with connected(port) as peer:
            peer.send(HELLO)
            for stream in opened:
                peer.send(frame(frames.HEADERS, frames.END_HEADERS, stream, head("Stubborn")))
                peer.send(frame(frames.DATA, frames.END_STREAM, stream, MESSAGE))
                # So that the handler has begun.
                peer.send(frame(frames.PING, 0, 0, b"12345678"))
                kind, _, number, payload = await peer.frame(frames.PING, frames.RST_STREAM)
                if kind == frames.RST_STREAM:
                    break
                peer.send(frames.rst_stream(stream, frames.CANCEL))
            assert (number, frames.read_word(payload)) == (opened[20], frames.REFUSED_STREAM)
            assert echo.running <= 20

    async def test_cancelled_calls_count_until_their_handlers_ended(self, port, echo):
        """CVE-2023-44487: calls opened and reset faster than they end."""
        wait = head("Wait")
        async with connected(port) as peer:
            peer.send(HELLO)
            for stream in range(1, 4001, 2):
                peer.send(frame(frames.HEADERS, frames.END_HEADERS, stream, wait))
                peer.send(frame(frames.DATA, frames.END_STREAM, stream, MESSAGE))
                peer.send(frames.rst_stream(stream, frames.CANCEL))
            peer.send(frame(frames.PING, 0, 0, b"12345678"))
            await peer.frame(frames.PING)
            assert echo.running <= 20
        await check_alive(port)


def test_a_repeated_block_is_read_from_memory_until_the_table_changes():
    encoder, reader = hpack.Encoder(), HeaderReader(10_000)

    def block(path: str) -> bytes:
        fields = [(":method", "POST"), (":path", path), ("content-type", "application/grpc")]
        return encoder.encode(fields, huffman=False)

    first = [block("/a/A") for _ in range(3)]
    assert first[1] == first[2] != first[0]
    assert [reader.read(each).path for each in first] == ["/a/A"] * 3
    # The table moves on: the same bytes mean something else.
    moved = block("/b/B")
    assert reader.read(moved).path == "/b/B"
    again = [block("/b/B"), block("/a/A")]
    assert [reader.read(each).path for each in again] == ["/b/B", "/a/A"]
    assert first[1] in (again[0], again[1]) or again[0] != first[1]


@given(
    st.lists(
        st.one_of(
            st.builds(
                frame,
                st.integers(0, 10),
                st.integers(0, 255),
                st.integers(0, 9),
                st.binary(max_size=60),
            ),
            st.sampled_from([call(1), call(3), call(5), frames.window_update(1, 5)]),
            st.binary(max_size=40),
        ),
        max_size=12,
    )
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_only_its_connection_can_suffer(parts):
    async def run() -> None:
        server = GrpcServer(TransportLimits())
        port = server.listen("127.0.0.1", 0)
        await server.start()
        problems: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: problems.append(what))
        async with connected(port) as peer:
            peer.send(HELLO, *parts)
            peer.writer.write_eof()
            await asyncio.wait_for(peer.reader.read(), 10)
        await server.stop(5)
        assert problems == []

    asyncio.run(run())
