"""Malformed and unusual gRPC calls, each a function of a connection."""

import gzip
import zlib
from collections.abc import Callable
from functools import partial

from convoy.oip.v2 import inference_pb2
from tests.edge.frames import (
    CHECK,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INFERENCE,
    REFLECTION,
    WATCH,
    Http2Client,
    frame,
    literal_block,
    message,
    request_fields,
)

# Sends a call and returns its stream.
Probe = Callable[[Http2Client], int]

READY = f"{INFERENCE}/ModelReady"
PLAIN = inference_pb2.ModelReadyRequest(name="colors").SerializeToString()
GZIPPED = gzip.compress(PLAIN)
MIB = 2**20


def _fields(path: str = CHECK, **changes: str | None) -> Probe:
    return lambda client: client.call(path, **changes)


def _raw_field(name: str, value: bytes) -> Probe:
    """A Check with one field in bytes that are no ASCII text."""

    def probe(client: Http2Client) -> int:
        stream_id = client.new_stream()
        fields = [*dict(request_fields(), **{name: value}).items()]
        block = literal_block(fields)
        client.send(frame(HEADERS, END_HEADERS, stream_id, block))
        client.data(stream_id, EMPTY_MESSAGE, end=True)
        return stream_id

    return probe


def _body(body: bytes, path: str = READY, **changes: str | None) -> Probe:
    return lambda client: client.call(path, body, **changes)


def _gzip(content: bytes, flag: int = 1, encoding: str | None = "gzip") -> Probe:
    return _body(message(content, flag), grpc_encoding=encoding)


def _no_body(path: str, deadline: str | None = None) -> Probe:
    def probe(client: Http2Client) -> int:
        stream_id = client.new_stream()
        fields = request_fields(path, grpc_timeout=deadline)
        client.headers(stream_id, fields, END_HEADERS | END_STREAM)
        return stream_id

    return probe


def _large_metadata(size: int) -> Probe:
    """Metadata during a call in flight, which must not be affected."""

    def probe(client: Http2Client) -> int:
        watch = client.call(WATCH)
        client.wait(lambda: client.reply(watch).data)
        stream_id = client.call(**{f"x_large_{part}": "a" * 7000 for part in range(size // 7000)})
        client.answer(stream_id)
        if client.ended(watch):
            return watch
        return stream_id

    return probe


PROBES: dict[str, Probe] = {
    # method
    "GET": _fields(_method="GET"),
    "PUT": _fields(_method="PUT"),
    "OPTIONS": _fields(_method="OPTIONS"),
    # content-type
    "content-type missing": _fields(content_type=None),
    "content-type text/plain": _fields(content_type="text/plain"),
    "content-type application/json": _fields(content_type="application/json"),
    "content-type application/grpc-web": _fields(content_type="application/grpc-web"),
    "content-type application/grpcx": _fields(content_type="application/grpcx"),
    "content-type with parameters": _fields(content_type="application/grpc; charset=utf-8"),
    "content-type in upper case": _fields(content_type="APPLICATION/GRPC"),
    "content-type application/grpc+json": _fields(content_type="application/grpc+json"),
    # path
    "unknown service": _fields("/unknown.Service/Method"),
    "unknown method": _fields("/grpc.health.v1.Health/Unknown"),
    "path /": _fields("/"),
    "path of one part": _fields("/Check"),
    "path with a query": _fields(f"{CHECK}?service=colors"),
    "path with two slashes": _fields(f"/{CHECK}"),
    "path with a slash at its end": _fields(f"{CHECK}/"),
    "path percent-encoded": _fields(CHECK.replace("C", "%43")),
    "path not ASCII": _raw_field(":path", "/模型".encode()),
    # other fields
    "te missing": _fields(te=None),
    "authority missing": _fields(_authority=None),
    "scheme ftp": _fields(_scheme="ftp"),
    # timeout
    **{
        f"grpc-timeout {value!r}": _fields(grpc_timeout=value)
        for value in ("", "5", "S", "1X", "1s", "123456789S", "-1S", "1.5S", "1 S", "0S", "0n")
    },
    "grpc-timeout '99999999H'": _fields(grpc_timeout="99999999H"),
    # metadata
    "binary metadata not base64": _fields(x_data_bin="!!!"),
    "binary metadata of a wrong length": _fields(x_data_bin="AAAAA"),
    "binary metadata in URL-safe base64": _fields(x_data_bin="_-__"),
    "metadata not ASCII": _raw_field("x-name", "模型".encode()),
    "metadata with a control character": _raw_field("x-name", b"a\x01b"),
    "unknown field of grpc-": _fields(grpc_unknown="value"),
    "metadata of 7 KB beside a call": _large_metadata(7_000),
    "metadata of 28 KB beside a call": _large_metadata(28_000),
    "metadata of 49 KB beside a call": _large_metadata(49_000),
    "metadata of 300 KB beside a call": _large_metadata(300_000),
    # messages
    "no message to a method of streams": _no_body(REFLECTION),
    "two messages to a unary method": _body(message(PLAIN) * 2),
    "a message that is no protobuf": _body(message(b"\xff" * 20)),
    "prefix shorter than the message": _body(message(PLAIN) + b"\0"),
    "prefix of 4 GiB": _body(b"\0\xff\xff\xff\xff" + PLAIN),
    "prefix over the largest message": _body(b"\0" + (64 * MIB).to_bytes(4, "big") + PLAIN),
    "prefix cut on a stream": _body(bytes(3), REFLECTION),
    # compression
    "gzip": _gzip(GZIPPED),
    "gzip without the flag": _gzip(PLAIN, flag=0),
    "gzip truncated": _gzip(GZIPPED[:-4]),
    "gzip truncated to its header": _gzip(GZIPPED[:10]),
    "gzip with garbage after it": _gzip(GZIPPED + b"garbage"),
    "gzip twice": _gzip(GZIPPED * 2),
    "gzip with a wrong checksum": _gzip(GZIPPED[:-8] + bytes(8)),
    "gzip of nothing": _gzip(b""),
    "gzip that is none": _gzip(PLAIN),
    "gzip over the largest message": _gzip(gzip.compress(bytes(64 * MIB))),
    "deflate": _gzip(zlib.compress(PLAIN), encoding="deflate"),
    "deflate that is gzip": _gzip(GZIPPED, encoding="deflate"),
    "flag of compression without an encoding": _gzip(GZIPPED, encoding=None),
    "flag of compression with identity": _gzip(GZIPPED, encoding="identity"),
    "unknown encoding without the flag": _gzip(PLAIN, flag=0, encoding="br"),
    "unknown encoding": _gzip(PLAIN, encoding="br"),
}

# Calls that gRPC's C core answers at their deadline alone, which is the argument.
UNFINISHED: dict[str, Callable[[str], Probe]] = {
    "no message to a unary method": partial(_no_body, CHECK),
    "no message to a method that answers by a stream": partial(_no_body, WATCH),
    "body without a message": lambda deadline: _body(b"", grpc_timeout=deadline),
    "two messages to a method that answers by a stream": lambda deadline: _body(
        EMPTY_MESSAGE * 2, WATCH, grpc_timeout=deadline
    ),
    "prefix of 3 bytes": lambda deadline: _body(bytes(3), grpc_timeout=deadline),
    "prefix longer than the message": lambda deadline: _body(
        message(PLAIN)[:-1], grpc_timeout=deadline
    ),
}
