"""Dynamic batching, deadline by deadline: from requests to batches to answers.

`DynamicBatcher` (batcher.py) is the whole interface. Inside, a request that was admitted
(admission.py) stands in the queue (queue.py) until a free instance (instance.py) is given a batch
(dispatcher.py), chosen (scheduling.py) by what is predicted (forecast.py) from measured run times
(latency.py). Then it gets its rows (delivery.py, answers.py). watchdog.py notices a run that hangs,
and observer.py is what the rest of the server gets to know of it.
"""

from server.batcher.batcher import Clock, DynamicBatcher
from server.batcher.instance import Allocate, Runner
from server.batcher.latency import LatencyModel
from server.batcher.limits import BatcherSnapshot, BatchingLimits
from server.batcher.observer import BatchObserver, BatchReport

__all__ = [
    "Allocate",
    "BatchObserver",
    "BatchReport",
    "BatcherSnapshot",
    "BatchingLimits",
    "Clock",
    "DynamicBatcher",
    "LatencyModel",
    "Runner",
]
