"""A closed-loop load generator: so many requests are always under way, latency is what each took.

A closed loop slows down with the server it measures. It answers "how much can it do", not "how long
do my users wait at this rate".
"""

import asyncio
import time
from dataclasses import dataclass

import numpy as np

from clients.aio import AsyncClient
from clients.errors import ClientError
from clients.images import ImageLike

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What a run measured.

    Attributes:
        concurrency: Requests that were always under way.
        duration_s: How long requests were sent for.
        completed: Requests answered with a class.
        errors: How many ended otherwise, by kind of error.
        latency_s: Latency of the completed requests at each of PERCENTILES.
        mean_batch_size: Images in the batches that the requests were run in, averaged over them.
    """

    concurrency: int
    duration_s: float
    completed: int
    errors: dict[str, int]
    latency_s: dict[float, float]
    mean_batch_size: float

    @property
    def throughput_per_s(self) -> float:
        """Completed requests a second."""
        return self.completed / self.duration_s


async def run_closed_loop(
    client: AsyncClient, image: ImageLike, *, model: str, concurrency: int, duration_s: float
) -> BenchReport:
    """Sends the same picture again and again.

    Raises:
        ClientError: The very first request failed; there is nothing to measure.
    """
    await client.classify(image, model=model)
    latencies_s: list[float] = []
    batch_sizes: list[int] = []
    errors: dict[str, int] = {}
    started_s = time.perf_counter()

    async def keep_asking() -> None:
        while (sent_s := time.perf_counter()) - started_s < duration_s:
            try:
                answer = await client.classify(image, model=model)
            except ClientError as error:
                kind = type(error).__name__
                errors[kind] = errors.get(kind, 0) + 1
                continue
            latencies_s.append(time.perf_counter() - sent_s)
            batch_sizes.append(answer.batch_size)

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    elapsed_s = time.perf_counter() - started_s
    measured = bool(latencies_s)
    return BenchReport(
        concurrency=concurrency,
        duration_s=elapsed_s,
        completed=len(latencies_s),
        errors=errors,
        latency_s={p: float(np.percentile(latencies_s, p)) for p in PERCENTILES if measured},
        mean_batch_size=float(np.mean(batch_sizes)) if measured else 0.0,
    )
