r"""A closed loop over HTTP/1.1 with bodies made beforehand; prints what came of it as JSON.

    python -m benchmarks.http_load http://127.0.0.1:8002/v2/models/small/infer \
        --input image --tensor UINT8:1,32,32,3 --concurrency 32

The body is a request of the Open Inference Protocol with its tensor in binary, or, without --input,
the tensor alone. Each place of the loop has a connection of its own.
"""

import argparse
import asyncio
import json
import statistics
import time
from itertools import count
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

DIFFERENT_BODIES = 16
DTYPES = {"UINT8": np.uint8, "FP32": np.float32}


def bodies(tensor: str, name: str) -> list[tuple[bytes, int]]:
    """Returns bodies and the length of their JSON, 0 where they have none."""
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
    """Returns whole requests as they go over the wire."""
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


class Place(asyncio.Protocol):
    """A connection that always has one request under way."""

    def __init__(self, loop: "ClosedLoop") -> None:
        self._loop = loop
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._loop.answered(self._sent_s, self._parser.get_status_code())
        # A parser reads one reply after another only where the connection says that it stays.
        self._parser = httptools.HttpResponseParser(self)
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._loop.lost()

    def _send(self) -> None:
        self._sent_s = time.monotonic()
        self._transport.write(self._loop.next_request())


class ClosedLoop:
    """What all places share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._requests = requests(arguments)
        self._number = count()
        self._begin_s = time.monotonic() + arguments.warmup_s
        self._end_s = self._begin_s + arguments.seconds
        self._latencies_s: list[float] = []
        self._over = False
        self.broken = ""

    def next_request(self) -> bytes:
        return self._requests[next(self._number) % DIFFERENT_BODIES]

    def answered(self, sent_s: float, status: int) -> None:
        now_s = time.monotonic()
        if status != 200:
            self.broken = f"status {status}"
        if self._begin_s <= now_s < self._end_s:
            self._latencies_s.append(now_s - sent_s)

    def lost(self) -> None:
        if not self._over:
            self.broken = "a connection was lost"

    async def run(self, url: str, concurrency: int) -> dict[str, float]:
        """Returns the percentiles of the latency."""
        loop, address = asyncio.get_running_loop(), urlsplit(url)
        for _ in range(concurrency):
            await loop.create_connection(lambda: Place(self), address.hostname, address.port)
        await asyncio.sleep(self._end_s - time.monotonic())
        self._over = True
        if self.broken:
            raise SystemExit(f"{url}: {self.broken}")
        percentiles = statistics.quantiles(self._latencies_s, n=100)
        return {"p50": percentiles[49], "p99": percentiles[98]}

    @property
    def completed(self) -> int:
        return len(self._latencies_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--input", default="", help="name of the tensor; none for a bare tensor")
    parser.add_argument("--tensor", default="UINT8:1,32,32,3", help="DATATYPE:D,D,D")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--warmup-s", type=float, default=1.0)
    arguments = parser.parse_args()
    closed = ClosedLoop(arguments)
    latency_s = uvloop.run(closed.run(arguments.url, arguments.concurrency))
    run = {
        "throughput_per_s": closed.completed / arguments.seconds,
        "latency_s": latency_s,
        "warmup_s": arguments.warmup_s,
        "duration_s": arguments.seconds,
    }
    print(json.dumps({"runs": [run]}))


if __name__ == "__main__":
    main()
