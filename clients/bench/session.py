"""What a command line asks to be measured, put into plans and carried out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from clients.bench import BenchError
from clients.bench.arrivals import Constant, Poisson, Trace
from clients.bench.generator import LoadGenerator, Measurement
from clients.bench.payload import (
    Payload,
    TensorSpec,
    choose_input,
    encoded_payload,
    raw_payload,
    tensor_payload,
)
from clients.bench.plan import ClosedLoop, OpenLoop, Plan
from clients.bench.stages import MetricsPage
from clients.bench.sweep import Sweep, find_highest_rate
from clients.client import Client
from clients.connection import Connection
from clients.errors import from_rpc_error
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc

NO_METRICS = "none"

_DEFAULT_CONCURRENCY = 8
_LOOK_S = 1.0
# Of what a closed loop reaches: a sweep begins where the objective is likely held.
_SWEEP_FROM = 0.5

Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True)
class PayloadWish:
    """What shall be sent.

    Attributes:
        files: Images or arrays; may be none for raw payloads.
        tensors: Whether by the Open Inference Protocol instead of convoy.v1.
        encoded: Whether images travel as files.
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
        """Asks the server what it needs to know and serialises the requests.

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
class LoadWish:
    """Under which loads it shall be measured.

    Attributes:
        concurrency: Closed loops, "N,N,N".
        rate: Open loops, "N,N,N"; where a sweep begins.
        trace: An open loop of recorded arrivals.
        constant: Whether open loops send at even gaps instead of a Poisson process's.
        seed: Of the Poisson process.
        sweep: Whether the highest rate that holds the objective is searched.
    """

    concurrency: str = ""
    rate: str = ""
    trace: Path | None = None
    constant: bool = False
    seed: int = 0
    sweep: bool = False

    def loads(self) -> list[Load]:
        """Returns one for each run; without any wish, a closed loop of eight requests.

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
        """Returns the open loop of a rate."""
        if self.constant:
            return OpenLoop(Constant(rate_per_s))
        return OpenLoop(Poisson(rate_per_s, self.seed))


def metrics_page(
    url: str | None, connection: Connection, model: str, payload: Payload
) -> MetricsPage | None:
    """Returns where the server's metrics are; None where there are none, or none are wanted.

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
    generator: LoadGenerator, wish: LoadWish, plan: Plan, tell: Callable[[Measurement], None]
) -> Sweep:
    """Makes the runs that were wished.

    Args:
        generator: What sends.
        wish: The loads.
        plan: All but the load; has an objective for a sweep.
        tell: Called with each run.

    Raises:
        BenchError: A wish cannot be fulfilled, the server answers nothing, or a worker failed.
    """

    def run(load: Load) -> Measurement:
        measurement = generator.run(replace(plan, load=load))
        tell(measurement)
        return measurement

    if not wish.sweep:
        return Sweep(tuple(run(load) for load in wish.loads()), None)
    if plan.slo_s is None or wish.concurrency or wish.trace or "," in wish.rate:
        raise BenchError("--sweep: needs --slo-ms, and takes no load but one --rate to begin at")
    start_per_s = float(wish.rate) if wish.rate else _SWEEP_FROM * _capacity(generator, plan)
    return find_highest_rate(lambda rate_per_s: run(wish.at(rate_per_s)), start_per_s)


def _capacity(generator: LoadGenerator, plan: Plan) -> float:
    look = replace(plan, load=ClosedLoop(_DEFAULT_CONCURRENCY), duration_s=_LOOK_S)
    if answered_per_s := generator.run(look).throughput_per_s:
        return answered_per_s
    raise BenchError("--sweep: the server answered nothing to begin with")


def _numbers(name: str, text: str) -> Iterator[float]:
    for part in filter(None, text.split(",")):
        try:
            yield float(part)
        except ValueError:
            raise BenchError(f"{name}: expected N or N,N,N, got {text!r}") from None
