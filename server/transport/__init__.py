"""gRPC over HTTP/2 on the server's own event loop.

A stand-in for `grpc.aio.server` under the same servicers: handlers made by the generated code, and
grpcio's reflection, run on either. It costs a fraction of the processor time per call, because a
call never leaves the event loop's thread: no completion queue, no poller thread, no wake-ups.

    frames       the wire format of HTTP/2 (RFC 9113)
    headers      header blocks (RFC 7541) and what gRPC puts into them
    messages     gRPC's length-prefixed messages
    connection   one peer: frames, streams, flow control
    call         one RPC: its handler, its deadline, its status
    server       handlers by name, listening, draining

Source of gRPC's part: github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md.
"""

from server.transport.limits import TransportLimits
from server.transport.server import GrpcServer

__all__ = ["GrpcServer", "TransportLimits"]
