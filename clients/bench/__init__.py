"""A load generator whose figures can be trusted, for any server of the Open Inference Protocol.

A closed loop keeps so many requests under way; it slows down with the server it measures, so it
answers "how much can it do". An open loop sends at times fixed beforehand, as users do, and counts
latency from the intended time: a server (or a client) that stalls makes every request that was due
meanwhile late, and all of that shows. Measuring from the actual sending instead is known as
coordinated omission (Gil Tene, "How NOT to Measure Latency").

    arrivals.py    when requests are to be sent
    plan.py        how a run goes
    payload.py     what is sent: serialised once, before the run
    worker.py      a process that sends and notes how each request ended
    generator.py   several such processes, and what they measured together
    latencies.py   HDR histograms that merge
    stages.py      the server's own metrics: where the time went
    sweep.py       the highest rate that an objective allows
    report.py, plot.py   tables, JSON, pictures
"""

from clients.errors import ClientError


class BenchError(ClientError):
    """A measurement cannot be made, or a worker process of it failed."""
