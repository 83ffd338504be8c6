"""A load generator for any server of the Open Inference Protocol.

A closed loop keeps a number of requests in flight. It slows down with the server, so it measures
capacity. An open loop sends at times that are fixed in advance, as users do, and counts latency
from the intended time: a stall of the server (or of the client) delays every request that was due
meanwhile. Measuring from the actual sending instead hides the stall, which is known as
coordinated omission (Gil Tene, "How NOT to Measure Latency").

    plan, payload          a run, and what it sends, serialized beforehand
    worker, generator      processes that send, and their measurement
    latencies, stages      HDR histograms; the server's share of the time
    session                the runs of a command line; the sweep
    report, plot, compare  tables, JSON, plots; two measurements side by side
"""

from convoy.client.errors import ClientError


class BenchError(ClientError):
    """A measurement cannot be made, or a worker process of it failed."""
