"""Dynamic batching, deadline by deadline: from requests to batches to answers.

`DynamicBatcher` (batcher.py) is the whole interface. Inside, a request stands in the queue
(queue.py) until a free instance (instance.py) takes a batch that scheduling.py chose by the run
times that latency.py predicts; answers.py gives the rows back, and observer.py is what the rest of
the server gets to know of it.
"""

from server.batcher.batcher import Clock, DynamicBatcher
from server.batcher.latency import LatencyModel
from server.batcher.limits import BatcherSnapshot, BatchingLimits
from server.batcher.observer import BatchObserver, BatchReport

__all__ = [
    "BatchObserver",
    "BatchReport",
    "BatcherSnapshot",
    "BatchingLimits",
    "Clock",
    "DynamicBatcher",
    "LatencyModel",
]
