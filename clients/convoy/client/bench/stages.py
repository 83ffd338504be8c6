"""Where a request's time went: the client's clocks and the server's own metrics together."""

import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from convoy.client.bench import BenchError
from convoy.client.bench.latencies import Latencies

_READ_TIMEOUT_S = 5.0

Counts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Names:
    """What a server calls its metrics: for each mean the sum and the count behind it."""

    request: tuple[str, str]
    queue: tuple[str, str]
    inference: tuple[str, str]
    batch: tuple[str, str]
    unit_s: float
    decode: tuple[str, str] | None = None


_SERVERS = (
    _Names(
        request=("convoy_request_duration_seconds_sum", "convoy_request_duration_seconds_count"),
        queue=("convoy_queue_duration_seconds_sum", "convoy_queue_duration_seconds_count"),
        inference=(
            "convoy_inference_duration_seconds_sum",
            "convoy_inference_duration_seconds_count",
        ),
        batch=("convoy_batch_size_images_sum", "convoy_batch_size_images_count"),
        unit_s=1.0,
        decode=("convoy_decode_duration_seconds_sum", "convoy_decode_duration_seconds_count"),
    ),
    _Names(  # Triton
        request=("nv_inference_request_duration_us", "nv_inference_request_success"),
        queue=("nv_inference_queue_duration_us", "nv_inference_request_success"),
        inference=("nv_inference_compute_infer_duration_us", "nv_inference_request_success"),
        batch=("nv_inference_count", "nv_inference_exec_count"),
        unit_s=1e-6,
    ),
)


@dataclass(frozen=True, slots=True)
class Stages:
    """Mean times of the answered requests, in seconds; together they are the mean latency.

    Attributes:
        client_s: From when a request was due until it was sent.
        network_s: What the server's handler does not see: gRPC on both sides, what lies between,
            and the wait for the server's event loop.
        decode_s: Until the image files were decoded, by the server's metrics or a sample of its
            replies; 0 where neither says.
        queue_s: Until its batch was formed.
        inference_s: A batch's run, the mean over batches.
        server_s: The rest of the server's time: checking, replying.
        batch_size: Images in a batch, the mean over batches.
    """

    client_s: float
    network_s: float
    decode_s: float
    queue_s: float
    inference_s: float
    server_s: float
    batch_size: float

    @classmethod
    def of(
        cls,
        latency: Latencies,
        lag: Latencies,
        before: Counts,
        after: Counts,
        decode_s: float = 0.0,
    ) -> "Stages | None":
        """Split the server's time; None if its metrics do not allow it."""
        for names in _SERVERS:
            means = [
                _mean(sum_and_count, before, after)
                for sum_and_count in (names.request, names.queue, names.inference, names.batch)
            ]
            if None not in means:
                break
        else:
            return None
        request_s, queue_s, inference_s = (float(mean or 0) * names.unit_s for mean in means[:3])
        decoded_s = _decoded_s(names, before, after)
        decode_s = decode_s if decoded_s is None else decoded_s
        return cls(
            client_s=lag.mean_s,
            network_s=latency.mean_s - lag.mean_s - request_s,
            decode_s=decode_s,
            queue_s=queue_s,
            inference_s=inference_s,
            server_s=request_s - decode_s - queue_s - inference_s,
            batch_size=float(means[3] or 0),
        )


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """A server's Prometheus metrics.

    Attributes:
        url: Where they are.
        model: Whose metrics count; every model's where it is empty.
        rpc: The last part of the RPC's path, e.g. "Classify".
    """

    url: str
    model: str
    rpc: str

    def read(self) -> Counts:
        """Sum each metric over its labels, as far as they are the model's, the RPC's and OK.

        Raises:
            BenchError: They cannot be had.
        """
        try:
            with urllib.request.urlopen(self.url, timeout=_READ_TIMEOUT_S) as reply:
                text = reply.read().decode()
            families = list(text_string_to_metric_families(text))
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise BenchError(f"--metrics: {self.url}: {error}") from error
        counts: dict[str, float] = {}
        wanted = {"method": self.rpc, "code": "OK"} | ({"model": self.model} if self.model else {})
        for sample in (sample for family in families for sample in family.samples):
            if all(sample.labels.get(label, value) == value for label, value in wanted.items()):
                # The parser gives counters this ending, Triton does not.
                name = sample.name.removesuffix("_total")
                counts[name] = counts.get(name, 0.0) + sample.value
        return counts


def _decoded_s(names: _Names, before: Counts, after: Counts) -> float | None:
    """Return the mean time of decoding, over all requests; None where the server does not say."""
    if names.decode is None or names.decode[1] not in after:
        return None
    decode_s = _mean(names.decode, before, after) or 0.0
    decodes, requests = (
        after[count] - before.get(count, 0.0) for count in (names.decode[1], names.request[1])
    )
    return decode_s * min(1.0, decodes / requests)


def _mean(sum_and_count: tuple[str, str], before: Counts, after: Counts) -> float | None:
    total, count = (after.get(name, 0.0) - before.get(name, 0.0) for name in sum_and_count)
    return total / count if count > 0 else None
