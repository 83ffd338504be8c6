"""Disturbances that must not slow down a server: idle connections, and the load of a large model.

    python -m benchmarks.disturbances MODELS small --large OTHER_MODELS/resnet18/1

One server, one closed loop of requests, measured in turn with and without each disturbance. The
large model is copied to the side, moved into the repository when the load begins, served by the
end of it, and taken away again. Prints the median [least-greatest] over the rounds.
"""

import argparse
import contextlib
import json
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc

from benchmarks import loads
from benchmarks.loads import Load
from benchmarks.processes import Server, serving
from benchmarks.rounds import Round, Run, Turns, by_candidate
from benchmarks.tables import spread, table
from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc

CONNECTIONS = 1000
# HTTP/2's preface and an empty SETTINGS frame (RFC 9113, section 3.4).
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_WARM_S = 1.5
_PATIENCE_S = 120.0


@contextmanager
def idle_connections(address: str) -> Iterator[None]:
    """Hold connections that sent the preface and no request."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            peer = stack.enter_context(socket.create_connection((host, int(port))))
            peer.sendall(_GREETING)
        yield


@contextmanager
def large_model(address: str, models: Path, version: Path) -> Iterator[None]:
    """Publish a model while the load runs, wait until it is served, and remove it."""
    name = version.parent.name
    with tempfile.TemporaryDirectory(dir=models.parent) as aside:
        copy = Path(aside) / name
        shutil.copytree(version.parent, copy)
        publishing = threading.Timer(_WARM_S, copy.rename, [models / name])
        publishing.start()
        try:
            yield
            publishing.join()
            wait_until_ready(address, name, ready=True)
        finally:
            publishing.join()
            shutil.rmtree(models / name)
            wait_until_ready(address, name, ready=False)


def wait_until_ready(address: str, model: str, *, ready: bool) -> None:
    until_s = time.monotonic() + _PATIENCE_S
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        while stub.ModelReady(pb.ModelReadyRequest(name=model)).ready != ready:
            if time.monotonic() > until_s:
                raise SystemExit(f"{model}: expected ready={ready}")
            time.sleep(0.05)


def measure(
    server: Server,
    arguments: argparse.Namespace,
    disturbance: Callable[[], AbstractContextManager[None]],
) -> dict[str, list[Run]]:
    load = Load(arguments.model, seconds=arguments.seconds)

    def without(concurrency: str, _: int) -> Run:
        return loads.run(server, load, "--concurrency", concurrency)

    def disturbed(concurrency: str, number: int) -> Run:
        with disturbance():
            return without(concurrency, number)

    up = contextlib.nullcontext({"without": without, "with": disturbed})
    turns = Turns(arguments.rounds, arguments.tries, arguments.calm)
    rounds: dict[str, list[Round]] = turns.take([arguments.concurrency], lambda: up)
    found = by_candidate(rounds)
    return {kind: runs[arguments.concurrency] for kind, runs in found.items()}


def row(name: str, found: dict[str, list[Run]]) -> list[str]:
    cells = [name]
    for percentile in ("p50", "p99"):
        without, disturbed = (
            [1000 * run["latency_s"][percentile] for run in found[kind]]
            for kind in ("without", "with")
        )
        ratios = [after / before for before, after in zip(without, disturbed, strict=True)]
        cells += [spread(without, 1), spread(disturbed, 1), spread(ratios, 2)]
    return [*cells, str(sum(sum(run["errors"].values()) for run in found["with"]))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, help="a model repository")
    parser.add_argument("model", help="which of its models answers the load")
    parser.add_argument("--large", type=Path, required=True, help="the version that is loaded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--concurrency", default="8")
    parser.add_argument("--calm", type=float, default=0.2, help="as in benchmarks.server")
    parser.add_argument("--tries", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    # The server inherits the limit.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        shutil.copytree(arguments.models / arguments.model, models / arguments.model)
        command = [
            "convoy.server",
            "--repository",
            str(models),
            "--device",
            "cpu",
            "--poll-s",
            "0.2",
        ]
        command += ["--poll-s", "0.2", "--port", "0", "--metrics-port", "0", "--log-format", "json"]
        with serving(command) as server:
            idle = measure(server, arguments, lambda: idle_connections(server.address))
            loading = measure(
                server,
                arguments,
                lambda: large_model(server.address, models, arguments.large),
            )
    print(f"{arguments.concurrency} requests under way, ms")
    print()
    columns = ["disturbance", "p50 without", "with", "ratio", "p99 without", "with", "ratio"]
    rows = [row(f"{CONNECTIONS} idle connections", idle)]
    rows += [row(f"{arguments.large.parent.name} loads", loading)]
    print(table([*columns, "errors"], rows))
    others = {
        name: [run["other_cores"] for runs in found.values() for run in runs]
        for name, found in (("idle", idle), ("loading", loading))
    }
    print(json.dumps({"other_cores": others}))


if __name__ == "__main__":
    main()
