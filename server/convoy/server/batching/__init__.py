"""Dynamic batching with deadlines: queued requests run together.

`DynamicBatcher` (batcher.py) is the interface. `scheduler` decides which requests may wait in
`request_queue`, and which of them an idle `worker` runs when, from the predictions of `latency`.
`sizes` holds the batch sizes. `delivery` answers the requests with the rows of a batch.
"""

from convoy.server.batching.batcher import BatcherSnapshot, Clock, DynamicBatcher
from convoy.server.batching.delivery import BatchObserver, BatchReport
from convoy.server.batching.latency import LatencyModel
from convoy.server.batching.recovery import Health
from convoy.server.batching.request_queue import BatchingLimits
from convoy.server.batching.sizes import BatchSizes
from convoy.server.batching.worker import Allocate, InstanceThread, Runner

__all__ = [
    "Allocate",
    "BatchObserver",
    "BatchReport",
    "BatchSizes",
    "BatcherSnapshot",
    "BatchingLimits",
    "Clock",
    "DynamicBatcher",
    "Health",
    "InstanceThread",
    "LatencyModel",
    "Runner",
]
