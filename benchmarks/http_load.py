r"""A load over HTTP/1.1 with bodies made in advance; prints the result as JSON.

    python -m benchmarks.http_load http://127.0.0.1:8002/v2/models/small/infer \
        --input image --tensor UINT8:1,32,32,3 --concurrency 32
    python -m benchmarks.http_load http://127.0.0.1:9000/inference --tensor FP32:3,32,32 --rate 500

The body is a request of the Open Inference Protocol with its tensor in binary, or, without --input,
the tensor alone. Each request in flight has its own connection. The counts and the output are those
of `convoy-client bench`, with gRPC's names for the status of a request.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from itertools import cycle
from urllib.parse import SplitResult, urlsplit

import httptools
import numpy as np
import uvloop
from grpc import StatusCode

from convoy.client.bench.generator import Measurement
from convoy.client.bench.plan import ClosedLoop, OpenLoop, Plan, Poisson, Share
from convoy.client.bench.report import run_as_json
from convoy.client.bench.worker import Recorder

DIFFERENT_BODIES = 16
DTYPES = {"UINT8": np.uint8, "FP32": np.float32}
CODES = {200: StatusCode.OK, 429: StatusCode.RESOURCE_EXHAUSTED, 503: StatusCode.UNAVAILABLE}
MOST_UNDER_WAY = 2000


def bodies(tensor: str, name: str) -> list[tuple[bytes, int]]:
    """Return bodies and the length of their JSON, 0 where they have none."""
    datatype, _, lengths = tensor.partition(":")
    shape = [int(length) for length in lengths.split(",")]
    random = np.random.default_rng(0).random((DIFFERENT_BODIES, *shape))
    tensors = (255 * random if datatype == "UINT8" else random).astype(DTYPES[datatype])
    if not name:
        return [(each.tobytes(), 0) for each in tensors]
    described = {"name": name, "datatype": datatype, "shape": shape}
    described["parameters"] = {"binary_data_size": tensors[0].nbytes}
    text = {"inputs": [described], "parameters": {"binary_data_output": True}}
    head = json.dumps(text).encode()
    return [(head + each.tobytes(), len(head)) for each in tensors]


def requests(arguments: argparse.Namespace) -> list[bytes]:
    """Return whole requests as they go over the wire."""
    url = urlsplit(arguments.url)
    found = []
    for body, head_bytes in bodies(arguments.tensor, arguments.input):
        fields = [
            f"POST {url.path} HTTP/1.1",
            f"Host: {url.netloc}",
            f"Content-Length: {len(body)}",
        ]
        fields += ["Content-Type: application/octet-stream"]
        fields += [f"Inference-Header-Content-Length: {head_bytes}"] if head_bytes else []
        found.append("\r\n".join([*fields, "", ""]).encode() + body)
    return found


class Connection(asyncio.Protocol):
    """Sends one request after the other."""

    def __init__(self, load: "HttpLoad") -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self.due_s = 0.0
        self.sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, request: bytes, due_s: float) -> None:
        self.due_s, self.sent_s = due_s, time.monotonic()
        self._transport.write(request)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        code = CODES.get(self._parser.get_status_code(), StatusCode.UNKNOWN)
        # A parser reads one reply after another only where the connection says that it stays.
        self._parser = httptools.HttpResponseParser(self)
        self._load.ended(self, code, stays=True)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.ended(self, StatusCode.UNAVAILABLE, stays=False)


class HttpLoad:
    """Carries out a plan.

    Args:
        address: Where the server is.
        bodies: Whole requests, sent in turn.
        plan: How.
    """

    def __init__(self, address: SplitResult, bodies: list[bytes], plan: Plan) -> None:
        self._address = address
        self._requests = cycle(bodies)
        self._plan = plan
        self._start_s = time.monotonic()
        self._end_s = self._start_s + plan.length_s
        begin_s = self._start_s + plan.warmup_s
        self._notes = Recorder(begin_s, self._end_s, plan.slo_s)
        self._free: list[Connection] = []
        # In the order of sending.
        self._under_way: dict[Connection, None] = {}
        self._broken = ""

    async def run(self) -> Measurement:
        """Send, wait for the requests in flight, and count."""
        cpu_s = time.process_time()
        if isinstance(self._plan.load, ClosedLoop):
            for _ in range(self._plan.load.concurrency):
                await self._send(time.monotonic())
        else:
            await self._send_at(self._plan.load.arrivals.times_s(Share()))
        await asyncio.sleep(self._end_s - time.monotonic())
        cores = (time.process_time() - cpu_s) / self._plan.length_s
        while self._under_way:
            self._give_up_on_the_late()
            await asyncio.sleep(0.01)
        for connection in self._free:
            connection.abort()
        if self._broken:
            raise SystemExit(f"{self._address.geturl()}: {self._broken} in a closed loop")
        return Measurement.of(self._plan, [self._notes.counts(cores)])

    def ended(self, connection: Connection, code: StatusCode, *, stays: bool) -> None:
        """Note that a connection has its answer or is lost."""
        if connection not in self._under_way:
            if connection in self._free and not stays:
                self._free.remove(connection)
            return
        del self._under_way[connection]
        now_s = time.monotonic()
        self._notes.ended(connection.due_s, connection.sent_s, now_s, code, None)
        if isinstance(self._plan.load, OpenLoop):
            self._free += [connection] if stays else []
        elif code is not StatusCode.OK:
            self._broken = code.name
        elif now_s < self._end_s:
            self._send_by(connection, now_s)
        else:
            self._free.append(connection)

    async def _send_at(self, times_s: Iterator[float]) -> None:
        for time_s in times_s:
            if time_s >= self._plan.length_s:
                return
            due_s = self._start_s + time_s
            if (left_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            self._give_up_on_the_late()
            if len(self._under_way) < MOST_UNDER_WAY:
                await self._send(due_s)
            else:
                self._notes.not_sent(due_s)

    async def _send(self, due_s: float) -> None:
        if not self._free:
            loop, address = asyncio.get_running_loop(), self._address
            _, connection = await loop.create_connection(
                lambda: Connection(self), address.hostname, address.port
            )
            self._free.append(connection)
        self._send_by(self._free.pop(), due_s)

    def _send_by(self, connection: Connection, due_s: float) -> None:
        self._under_way[connection] = None
        self._notes.sent()
        connection.send(next(self._requests), due_s)

    def _give_up_on_the_late(self) -> None:
        overdue_s = time.monotonic() - self._plan.timeout_s
        while self._under_way:
            oldest = next(iter(self._under_way))
            if oldest.sent_s > overdue_s:
                return
            del self._under_way[oldest]
            self._notes.ended(
                oldest.due_s,
                oldest.sent_s,
                time.monotonic(),
                StatusCode.DEADLINE_EXCEEDED,
                None,
            )
            oldest.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--input", default="", help="name of the tensor; none for a bare tensor")
    parser.add_argument("--tensor", default="UINT8:1,32,32,3", help="DATATYPE:D,D,D")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rate", type=float, help="Poisson arrivals a second, an open loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--warmup-s", type=float, default=1.0)
    parser.add_argument("--slo-ms", type=float, default=50.0)
    parser.add_argument("--timeout-s", type=float, default=2.0)
    arguments = parser.parse_args()
    rate_per_s = arguments.rate
    plan = Plan(
        OpenLoop(Poisson(rate_per_s, arguments.seed))
        if rate_per_s
        else ClosedLoop(arguments.concurrency),
        warmup_s=arguments.warmup_s,
        duration_s=arguments.seconds,
        slo_s=arguments.slo_ms / 1000,
        timeout_s=arguments.timeout_s,
    )

    async def measure() -> Measurement:
        return await HttpLoad(urlsplit(arguments.url), requests(arguments), plan).run()

    print(json.dumps({"runs": [run_as_json(uvloop.run(measure()))]}))


if __name__ == "__main__":
    main()
