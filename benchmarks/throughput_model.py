"""What bounds requests per second: a simulation of cores, front ends, owner, batches and devices.

    python -m benchmarks.throughput_model --gpus 8 --front-ends 16 --owner-ms 0.17 --images 8
    python -m benchmarks.throughput_model --cores 16 --on-cpu --instances 8 --front-ends 4 \
        --decode-ms 16
    python -m benchmarks.throughput_model --scale --on-cpu --image-ms 0.45

A request takes one of the front ends, then the owner's processor, then waits for a batch. An idle
instance takes what waits, up to the largest batch; instances of one device overlap their copies and
share its kernels. A batch costs the owner a hand-over. With `--cores` everything that is not a GPU
shares that many cores, first come, first served; without, each process has a core of its own. With
`--on-cpu` the instances run there too, each on one core. All times are milliseconds and inputs:
those of the host are measured by `benchmarks.host_costs` and `benchmarks.decoding`, those of the
device by `benchmarks.device_time`.
"""

import argparse
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# The flags of the fields of Costs.
COSTS = (
    *("--cores", "--gpus", "--instances", "--front-ends", "--images", "--max-batch"),
    *("--client-ms", "--decode-ms"),
    *("--front-ms", "--owner-ms", "--handover-ms", "--run-ms", "--image-ms", "--copy-ms"),
)


@dataclass(frozen=True, slots=True)
class Costs:
    """The machine and the load.

    Attributes:
        gpus: Devices.
        instances: Instances for each.
        front_ends: Processes that parse; 0 lets the owner parse.
        images: Of a request.
        front_ms: Of a front end, for each request.
        owner_ms: Of the owner, for each request.
        handover_ms: Of the owner, for each batch.
        run_ms: Of the device, for each batch.
        image_ms: Of the device, for each image.
        copy_ms: Of the copies of an image, which overlap the kernels of another instance.
        max_batch: Images in a batch.
        cores: Of the machine; 0 for as many as there are processes and threads.
        client_ms: Of a load generator on the same machine, one process, for each request.
        decode_ms: Of an image file; each core has a thread for it.
        on_cpu: Whether the instances run on the cores, too; there is one device then.
    """

    gpus: int = 1
    instances: int = 2
    front_ends: int = 4
    images: int = 1
    front_ms: float = 0.40
    owner_ms: float = 0.17
    handover_ms: float = 0.05
    run_ms: float = 0.30
    image_ms: float = 0.005
    copy_ms: float = 0.0002
    max_batch: int = 256
    cores: int = 0
    client_ms: float = 0.0
    decode_ms: float = 0.0
    on_cpu: bool = False

    def bounds(self) -> dict[str, float]:
        """Return the requests/s that each part alone could serve."""
        batch = max(1, self.max_batch // self.images)
        run_ms = self.run_ms + self.max_batch * self.image_ms
        owner_ms = self.owner_ms + self.handover_ms / batch
        parsing = {"front ends": 1e3 * self.front_ends / self.front_ms}
        if not self.front_ends:
            owner_ms, parsing = owner_ms + self.front_ms, {}
        runs = self.instances if self.on_cpu else self.gpus
        bounds = parsing | {"owner": 1e3 / owner_ms, "devices": 1e3 * runs * batch / run_ms}
        if self.cores:
            host_ms = self.client_ms + self.images * self.decode_ms + self.front_ms + self.owner_ms
            host_ms += (self.handover_ms + (run_ms if self.on_cpu else 0.0)) / batch
            bounds["cores"] = 1e3 * self.cores / host_ms
        return bounds


@dataclass(slots=True)
class Result:
    """What a simulation found.

    Attributes:
        requests_per_s: That were answered.
        p50_ms: The median latency.
        p99_ms: The 99th percentile.
        batch: Images in a batch, on average.
        busy: The share of the time that each part worked.
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    batch: float
    busy: dict[str, float]


Happen = Callable[[float], None]


@dataclass(slots=True)
class Station:
    """A process, or threads, that work on one job each.

    Attributes:
        servers: How many jobs at a time.
        jobs: That wait: the number of their arrival, their duration, and what follows.
        running: Jobs that run.
        busy_ms: The duration of all that were begun.
    """

    servers: float
    jobs: deque[tuple[int, float, Happen]] = field(default_factory=deque)
    running: int = 0
    busy_ms: float = 0.0


class Machine:
    """Cores that stations share; the oldest job that its station can take runs, to its end.

    Args:
        cores: How many; 0 for no limit.
        at: Schedules an event.
    """

    def __init__(self, cores: int, at: Callable[[float, Happen], None]) -> None:
        self._idle = cores or math.inf
        self._at = at
        self._arrivals = itertools.count()
        self._stations: list[Station] = []
        self.busy_ms = 0.0

    def station(self, servers: float) -> Station:
        """Return a new station on this machine."""
        self._stations.append(Station(servers))
        return self._stations[-1]

    def submit(self, now_ms: float, station: Station, work_ms: float, then: Happen) -> None:
        """Give a station a job."""
        station.jobs.append((next(self._arrivals), work_ms, then))
        self._start(now_ms)

    def _start(self, now_ms: float) -> None:
        while self._idle:
            able = [each for each in self._stations if each.jobs and each.running < each.servers]
            if not able:
                return
            station = min(able, key=lambda each: each.jobs[0][0])
            _, work_ms, then = station.jobs.popleft()
            self._idle -= 1
            station.running += 1
            station.busy_ms += work_ms
            self.busy_ms += work_ms
            self._at(now_ms + work_ms, lambda at_ms, s=station, t=then: self._end(at_ms, s, t))

    def _end(self, now_ms: float, station: Station, then: Happen) -> None:
        self._idle += 1
        station.running -= 1
        then(now_ms)
        self._start(now_ms)


class Simulation:
    """A run of the model.

    Args:
        costs: The machine.
        in_flight: Requests of a closed loop.
        rate: Requests/s of an open loop with Poisson arrivals; 0 for the closed loop.
        requests: How many to answer.
    """

    def __init__(
        self, costs: Costs, in_flight: int = 256, rate: float = 0.0, requests: int = 20_000
    ) -> None:
        self._costs = costs
        self._in_flight = in_flight
        self._rate = rate
        self._requests = requests
        self._events: list[tuple[float, int, Happen]] = []
        self._order = itertools.count()
        self._host = host = Machine(costs.cores, self._at)
        self._clients, self._owner = host.station(1), host.station(1)
        self._fronts = host.station(max(1, costs.front_ends))
        self._decoders = host.station(costs.cores or math.inf)
        # The instances of a CPU run side by side, the kernels of a GPU one after the other.
        self._runners, kernels = (
            (host, [costs.instances]) if costs.on_cpu else (Machine(0, self._at), [1] * costs.gpus)
        )
        self._kernels = [self._runners.station(servers) for servers in kernels]
        self._idle = deque(itertools.chain(*[range(len(kernels))] * costs.instances))
        self._waiting: deque[float] = deque()
        self._latencies_ms: list[float] = []
        self._batches: list[int] = []

    def run(self) -> Result:
        """Simulate once; the same arguments give the same result."""
        costs, at_ms = self._costs, 0.0
        choose = random.Random(0)
        for _ in range(self._requests if self._rate else self._in_flight):
            at_ms += choose.expovariate(self._rate / 1e3) if self._rate else 0.0
            self._at(at_ms, self._arrive)
        now_ms = 0.0
        while self._events and len(self._latencies_ms) < self._requests:
            now_ms, _, happen = heapq.heappop(self._events)
            happen(now_ms)
        servers = sum(each.servers for each in self._kernels)
        busy = {
            "front ends": self._fronts.busy_ms / now_ms / max(1, costs.front_ends),
            "owner": self._owner.busy_ms / now_ms,
            "devices": sum(each.busy_ms for each in self._kernels) / now_ms / servers,
        }
        if costs.cores:
            busy["cores"] = self._host.busy_ms / now_ms / costs.cores
        return Result(
            requests_per_s=1e3 * len(self._latencies_ms) / now_ms,
            p50_ms=quantile(self._latencies_ms, 0.5),
            p99_ms=quantile(self._latencies_ms, 0.99),
            batch=sum(self._batches) / len(self._batches),
            busy=busy,
        )

    # The path of a request

    def _arrive(self, now_ms: float) -> None:
        work_ms = self._costs.client_ms
        self._work(now_ms, self._clients, work_ms, lambda at_ms: self._parse(at_ms, now_ms))

    def _parse(self, now_ms: float, began_ms: float) -> None:
        work_ms = self._costs.front_ms if self._costs.front_ends else 0.0
        self._work(now_ms, self._fronts, work_ms, lambda at_ms: self._decode(at_ms, began_ms))

    def _decode(self, now_ms: float, began_ms: float) -> None:
        work_ms = self._costs.images * self._costs.decode_ms
        self._work(now_ms, self._decoders, work_ms, lambda at_ms: self._own(at_ms, began_ms))

    def _own(self, now_ms: float, began_ms: float) -> None:
        costs = self._costs
        work_ms = costs.owner_ms + (0.0 if costs.front_ends else costs.front_ms)
        self._work(now_ms, self._owner, work_ms, lambda at_ms: self._enqueue(at_ms, began_ms))

    def _enqueue(self, now_ms: float, began_ms: float) -> None:
        self._waiting.append(began_ms)
        self._start_batches(now_ms)

    # The path of a batch

    def _start_batches(self, now_ms: float) -> None:
        costs, waiting = self._costs, self._waiting
        while waiting and self._idle:
            kernel = self._idle.popleft()
            room = max(1, costs.max_batch // costs.images)
            batch = [waiting.popleft() for _ in range(min(len(waiting), room))]
            images = len(batch) * costs.images
            self._batches.append(images)
            copied_ms = now_ms + images * costs.copy_ms
            self._at(copied_ms, lambda at_ms, b=batch, k=kernel: self._run(at_ms, b, k))

    def _run(self, now_ms: float, batch: list[float], kernel: int) -> None:
        work_ms = self._costs.run_ms + len(batch) * self._costs.images * self._costs.image_ms
        self._runners.submit(
            now_ms,
            self._kernels[kernel],
            work_ms,
            lambda at_ms: self._finish(at_ms, batch, kernel),
        )

    def _finish(self, now_ms: float, batch: list[float], kernel: int) -> None:
        self._idle.append(kernel)
        work_ms = self._costs.handover_ms
        self._work(now_ms, self._owner, work_ms, lambda at_ms: self._deliver(at_ms, batch))
        self._start_batches(now_ms)

    def _deliver(self, now_ms: float, batch: list[float]) -> None:
        for began_ms in batch:
            self._latencies_ms.append(now_ms - began_ms)
            if not self._rate:
                self._at(now_ms, self._arrive)

    def _work(self, now_ms: float, station: Station, work_ms: float, then: Happen) -> None:
        """Let the host work; at once if there is nothing to do."""
        if work_ms:
            self._host.submit(now_ms, station, work_ms, then)
        else:
            then(now_ms)

    def _at(self, at_ms: float, happen: Happen) -> None:
        heapq.heappush(self._events, (at_ms, next(self._order), happen))


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[int(share * (len(values) - 1))]


def best_front_ends(costs: Costs) -> tuple[Costs, Result]:
    """Return the fewest front ends that reach 95 % of the best rate, and what they reach."""
    counts = [0, *(1 << n for n in range(max(1, costs.cores).bit_length()))]
    choices = [replace(costs, front_ends=count) for count in counts]
    found = [
        (each, Simulation(each, 16 * (costs.cores + 1), requests=12_000).run()) for each in choices
    ]
    best = max(result.requests_per_s for _, result in found)
    return next(each for each in found if each[1].requests_per_s >= 0.95 * best)


def print_scale(costs: Costs) -> None:
    """Print what 1 to 64 cores reach with as many front ends as they need."""
    print("| cores | front ends | requests/s | p99, ms | busy: cores, owner, devices |")
    print("|---|---|---|---|---|")
    for cores in (1, 2, 4, 8, 16, 32, 64):
        own = {"instances": cores} if costs.on_cpu else {}
        chosen, found = best_front_ends(replace(costs, cores=cores, **own))
        busy = ", ".join(f"{found.busy[part]:.2f}" for part in ("cores", "owner", "devices"))
        rate, p99_ms = found.requests_per_s, found.p99_ms
        print(f"| {cores} | {chosen.front_ends} | {rate:,.0f} | {p99_ms:.0f} | {busy} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in COSTS:
        default = getattr(Costs(), flag.removeprefix("--").replace("-", "_"))
        parser.add_argument(flag, type=type(default), default=default)
    parser.add_argument("--on-cpu", action="store_true", help="the instances run on the cores")
    parser.add_argument("--scale", action="store_true", help="a table of 1 to 64 cores")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s; 0: a closed loop")
    arguments = vars(parser.parse_args())
    in_flight, rate = arguments.pop("in_flight"), arguments.pop("rate")
    scale = arguments.pop("scale")
    costs = Costs(**arguments)
    if scale:
        print_scale(costs)
        return
    found = Simulation(costs, in_flight, rate).run()
    print("bound      ", *(f"{part} {value:.0f}/s" for part, value in costs.bounds().items()))
    print("busy       ", *(f"{part} {share:.2f}" for part, share in found.busy.items()))
    images_per_s = found.requests_per_s * costs.images
    print(f"requests/s  {found.requests_per_s:.0f}, images/s {images_per_s:.0f}")
    print(f"latency     p50 {found.p50_ms:.2f} ms, p99 {found.p99_ms:.2f} ms")
    print(f"batch       {found.batch:.1f} images")


if __name__ == "__main__":
    main()
