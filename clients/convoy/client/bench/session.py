"""The runs that a command line asks for, and the search for the highest rate in an objective."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from convoy.client.bench import BenchError
from convoy.client.bench.generator import LoadGenerator, Measurement
from convoy.client.bench.payload import (
    Payload,
    TensorSpec,
    choose_input,
    encoded_payload,
    raw_payload,
    tensor_payload,
)
from convoy.client.bench.plan import ClosedLoop, Constant, OpenLoop, Plan, Poisson, Trace
from convoy.client.bench.stages import MetricsPage
from convoy.client.client import Client
from convoy.client.connection import Connection
from convoy.client.errors import from_rpc_error
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc

PERCENTILE = 99.0

_PRECISION = 1.05
_MOST_RUNS = 24
_LEAST_RATE_PER_S = 1.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a search found.

    Attributes:
        runs: All of them, as they were made.
        rate_per_s: The highest rate that met the objective twice; None if none did.
    """

    runs: tuple[Measurement, ...]
    rate_per_s: float | None


def find_highest_rate(measure: Callable[[float], Measurement], start_per_s: float) -> Sweep:
    """Search for the highest rate at which 99 % of all that was due is answered in time.

    It doubles or halves the rate until the objective is missed or met, narrows the gap to 5 %, and
    measures the found rate once more. If that misses the objective, it tries the next lower rate.

    Args:
        measure: Makes a run at a rate; its plan has an objective.
        start_per_s: Where to begin.
    """
    runs: list[Measurement] = []

    def holds(rate_per_s: float) -> bool:
        runs.append(measure(rate_per_s))
        return runs[-1].holds(PERCENTILE)

    held, lost = 0.0, math.inf
    rate_per_s = start_per_s
    while len(runs) < _MOST_RUNS and rate_per_s >= _LEAST_RATE_PER_S:
        if holds(rate_per_s):
            held = rate_per_s
        else:
            lost = rate_per_s
        if held and lost / held <= _PRECISION:
            break
        rate_per_s = _next(held, lost)
    while held >= _LEAST_RATE_PER_S and len(runs) < 2 * _MOST_RUNS:
        if holds(held):
            return Sweep(tuple(runs), held)
        held /= _PRECISION
    return Sweep(tuple(runs), None)


def _next(held: float, lost: float) -> float:
    if not held:
        return lost / 2
    return held * 2 if math.isinf(lost) else math.sqrt(held * lost)


NO_METRICS = "none"

_DEFAULT_CONCURRENCY = 8
_LOOK_S = 1.0
# Of the throughput of a closed loop: a sweep begins where the objective is probably met.
_SWEEP_FROM = 0.5

Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True)
class PayloadRequest:
    """The requested payload.

    Attributes:
        files: Images or arrays; may be none for raw payloads.
        tensors: Whether by the Open Inference Protocol instead of convoy.v1.
        encoded: Whether images are sent as files.
        spec: The tensor, for a server that does not describe its models.
        images: Images in a request of tensors.
    """

    files: tuple[Path, ...] = ()
    model: str = ""
    version: int = 0
    tensors: bool = False
    encoded: bool = True
    spec: TensorSpec | None = None
    images: int = 1

    def build(self, connection: Connection) -> Payload:
        """Ask the server for what is not given, and serialize the requests.

        Raises:
            ClientError: The server, a file or an option does not fit the rest.
        """
        if self.tensors:
            version = str(self.version) if self.version else ""
            spec = self.spec or self._described(connection, version)
            return tensor_payload(self.files, spec, self.images, self.model, version)
        if self.images != 1:
            raise BenchError("--images: convoy.v1 takes one image in a request; use --protocol oip")
        if self.encoded:
            return encoded_payload(self.files, self.model, self.version)
        with Client(connection.address, options=connection.options) as client:
            served = client.models()
        for status in served:
            if self.model in ("", status.name) and self.version in (0, status.version):
                return raw_payload(self.files, replace(status, version=self.version))
        names = ", ".join(status.name for status in served)
        raise BenchError(f"--model: expected one of {names}, got {self.model!r}")

    def _described(self, connection: Connection, version: str) -> TensorSpec:
        if not self.model:
            raise BenchError("--model: the Open Inference Protocol needs the model's name")
        stub = inference_pb2_grpc.GRPCInferenceServiceStub
        request = inference_pb2.ModelMetadataRequest(name=self.model, version=version)
        with connection.open() as channel:
            try:
                described = stub(channel).ModelMetadata(
                    request, timeout=connection.timeout_s, metadata=connection.metadata()
                )
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
        return choose_input(described.inputs, encoded=self.encoded)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The loads to measure.

    Attributes:
        concurrency: Closed loops, "N,N,N".
        rate: Open loops, "N,N,N"; where a sweep begins.
        trace: An open loop of recorded arrivals.
        constant: Whether open loops send at even gaps instead of a Poisson process's.
        seed: Of the Poisson process.
        sweep: Whether to search for the highest rate that meets the objective.
    """

    concurrency: str = ""
    rate: str = ""
    trace: Path | None = None
    constant: bool = False
    seed: int = 0
    sweep: bool = False

    def loads(self) -> list[Load]:
        """Return one for each run; by default a closed loop of eight requests.

        Raises:
            BenchError: A number is none, or too small.
        """
        concurrencies = _numbers("--concurrency", self.concurrency)
        loads: list[Load] = [ClosedLoop(int(number)) for number in concurrencies]
        loads += [self.at(number) for number in _numbers("--rate", self.rate)]
        if self.trace is not None:
            loads.append(OpenLoop(Trace.read(self.trace)))
        return loads or [ClosedLoop(_DEFAULT_CONCURRENCY)]

    def at(self, rate_per_s: float) -> OpenLoop:
        """Return the open loop of a rate."""
        if self.constant:
            return OpenLoop(Constant(rate_per_s))
        return OpenLoop(Poisson(rate_per_s, self.seed))


def metrics_page(
    url: str | None, connection: Connection, model: str, payload: Payload
) -> MetricsPage | None:
    """Return where the server's metrics are; None if there are none, or none are wanted.

    Raises:
        BenchError: There are none at the address that was given.
    """
    if url == NO_METRICS:
        return None
    rpc = payload.method.rpartition("/")[2]
    if url is not None:
        page = MetricsPage(url, model, rpc)
        page.read()
        return page
    host, _, port = connection.address.rpartition(":")
    if not port.isdigit() or "/" in host or "," in host:
        return None
    page = MetricsPage(f"http://{host}:{int(port) + 1}/metrics", model, rpc)
    try:
        page.read()
    except BenchError:
        return None
    return page


def measure(
    generator: LoadGenerator, request: LoadRequest, plan: Plan, tell: Callable[[Measurement], None]
) -> Sweep:
    """Carry out the requested runs.

    Args:
        generator: What sends.
        request: The loads.
        plan: All but the load; has an objective for a sweep.
        tell: Called with each run.

    Raises:
        BenchError: A request cannot be fulfilled, the server answers nothing, or a worker failed.
    """

    def run(load: Load) -> Measurement:
        measurement = generator.run(replace(plan, load=load))
        tell(measurement)
        return measurement

    if not request.sweep:
        return Sweep(tuple(run(load) for load in request.loads()), None)
    if plan.slo_s is None or request.concurrency or request.trace or "," in request.rate:
        raise BenchError("--sweep: expected --slo-ms, and no load except one --rate to begin at")
    start_per_s = float(request.rate) if request.rate else _SWEEP_FROM * _capacity(generator, plan)
    return find_highest_rate(lambda rate_per_s: run(request.at(rate_per_s)), start_per_s)


def _capacity(generator: LoadGenerator, plan: Plan) -> float:
    look = replace(plan, load=ClosedLoop(_DEFAULT_CONCURRENCY), duration_s=_LOOK_S)
    if answered_per_s := generator.run(look).throughput_per_s:
        return answered_per_s
    raise BenchError("--sweep: the server answered none of the first requests")


def _numbers(name: str, text: str) -> Iterator[float]:
    for part in filter(None, text.split(",")):
        try:
            yield float(part)
        except ValueError:
            raise BenchError(f"{name}: expected N or N,N,N, got {text!r}") from None
