from collections.abc import AsyncIterator

import pytest

from convoy.server.batching import BatchingLimits, BatchSizes, DynamicBatcher, LatencyModel, Runner
from tests.server.batching.fakes import SHAPE, Clock, GatedBackend, Make, Observer


@pytest.fixture
def backend() -> GatedBackend:
    return GatedBackend()


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(backend: GatedBackend, observer: Observer, clock: Clock) -> AsyncIterator[Make]:
    made: list[DynamicBatcher] = []

    def start(
        max_batch_size: int = 4,
        max_queue_size: int = 8,
        max_queue_delay_s: float = 0.0,
        instances: int = 1,
        latency: LatencyModel | None = None,
        sizes: BatchSizes | None = None,
        **limits_: object,
    ) -> DynamicBatcher:
        limits = BatchingLimits(
            max_batch_size, max_queue_size, max_queue_delay_s, instances, **limits_
        )
        batcher = DynamicBatcher(
            [Runner(backend.run)], SHAPE, limits, observer, clock, latency=latency, sizes=sizes
        )
        batcher.start(
            observer.health_changed, observer.batch_sizes.append, observer.sizes_corrected
        )
        made.append(batcher)
        return batcher

    yield start
    for _ in range(100):
        backend.permits.release()
    for batcher in made:
        await batcher.drain()
