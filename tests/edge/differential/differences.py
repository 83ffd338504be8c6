"""Where h2corn's transport answers malformed calls other than grpcio's, and why."""

from collections.abc import Mapping
from typing import NamedTuple


class Difference(NamedTuple):
    """What the transports answer, in the words of `answer_to`."""

    h2corn: str
    grpcio: str
    reason: str


def _differences(reason: str, answers: Mapping[str, tuple[str, str]]) -> dict[str, Difference]:
    """Return what several probes find for one reason; `answers` is by probe."""
    return {probe: Difference(*pair, reason) for probe, pair in answers.items()}


def _status(code: int) -> str:
    return f"HTTP 200, grpc-status {code}, connection works"


_RESET = "RST_STREAM INTERNAL_ERROR, connection works"
_PROTOCOL_ERROR = "RST_STREAM PROTOCOL_ERROR, connection works"
_WRONG_TYPE = ("HTTP 415, connection works", _status(0))

# By probe; `test_malformed_calls` fails for one that is missing, has changed or is gone.
DIFFERENCES: dict[str, Difference] = {
    **_differences(
        "The C core resets a call that is none of gRPC's; here it gets a status.",
        {
            "GET": (_status(13), _RESET),
            "PUT": (_status(13), _RESET),
            "te missing": (_status(13), _RESET),
        },
    ),
    **_differences(
        "Requests of another content type are REST's, and 415 is what gRPC's specification asks "
        "for.",
        {
            "content-type missing": _WRONG_TYPE,
            "content-type text/plain": _WRONG_TYPE,
            "content-type application/json": _WRONG_TYPE,
            "content-type application/grpc-web": _WRONG_TYPE,
            "content-type application/grpcx": _WRONG_TYPE,
        },
    ),
    **_differences(
        "h2corn rejects bytes that RFC 3986 and RFC 9110 forbid in a path or a field.",
        {
            "path not ASCII": (_PROTOCOL_ERROR, _status(12)),
            "metadata with a control character": (_PROTOCOL_ERROR, _status(0)),
        },
    ),
    **_differences(
        "h2corn asks for neither an authority nor a scheme of HTTP, and no servicer looks at them.",
        {
            "authority missing": (_status(0), _RESET),
            "scheme ftp": (_status(0), _status(13)),
        },
    ),
    **_differences(
        "The specification has at most eight digits and then a unit.",
        {
            "grpc-timeout '123456789S'": (_status(13), _status(0)),
            "grpc-timeout '1 S'": (_status(13), _status(0)),
        },
    ),
    **_differences(
        "Fields of up to 32 KiB are taken; the C core's default is 8 KiB, and 16 KiB at most.",
        {
            "metadata of 28 KB beside a call": (_status(0), _status(8)),
        },
    ),
    **_differences(
        "h2corn answers before there is a call.",
        {
            "metadata of 49 KB beside a call": ("HTTP 431, connection works", _status(8)),
        },
    ),
    **_differences(
        "h2corn does not decode header blocks over 64 KiB, so it has to end the connection.",
        {
            "metadata of 300 KB beside a call": (
                "GOAWAY COMPRESSION_ERROR, connection ends",
                _status(8),
            ),
        },
    ),
    **_differences(
        "gRPC's status codes have UNIMPLEMENTED for a wrong number of messages; the C core waits "
        "for the first until the deadline and drops those after it. (Watch runs until its "
        "deadline.)",
        {
            "no message to a unary method": (_status(12), _status(4)),
            "no message to a method that answers by a stream": (_status(12), _status(4)),
            "body without a message": (_status(12), _status(4)),
            "two messages to a unary method": (_status(12), _status(0)),
            "two messages to a method that answers by a stream": (_status(12), _status(4)),
            "prefix shorter than the message": (_status(12), _status(0)),
        },
    ),
    **_differences(
        "A body that ends within a message is malformed; the C core waits for the rest until the "
        "deadline, or drops it at the end of a stream.",
        {
            "prefix of 3 bytes": (_status(13), _status(4)),
            "prefix longer than the message": (_status(13), _status(4)),
            "prefix cut on a stream": (_status(13), _status(0)),
        },
    ),
    **_differences(
        "grpcio's synchronous server has INTERNAL here, grpc.aio has UNKNOWN.",
        {
            "a message that is no protobuf": (_status(13), _status(2)),
        },
    ),
    **_differences(
        "gRPC's specification has UNIMPLEMENTED, and for compressed messages alone.",
        {
            "unknown encoding": (_status(12), _status(13)),
            "unknown encoding without the flag": (_status(0), _status(13)),
        },
    ),
    **_differences(
        "The port serves HTTP/1.1, too.",
        {
            "HTTP/1.1 with application/grpc": ("HTTP/1.1 505", "no HTTP/1.1"),
            "HTTP/1.1 without application/grpc": ("HTTP/1.1 405", "no HTTP/1.1"),
        },
    ),
}
