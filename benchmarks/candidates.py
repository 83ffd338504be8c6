"""The servers of a comparison: those started here, and those that already run."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks import loads
from benchmarks.loads import HttpRequest, Load
from benchmarks.processes import Server, serving
from benchmarks.rounds import Run, Turns

CONVOY = "convoy"
REST = "convoy, binary REST"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server, and how requests are sent to it.

    Attributes:
        request: Over HTTP; the Open Inference Protocol's gRPC where there is none.
    """

    server: Server
    load: Load
    request: HttpRequest | None = None

    def measure(self, *flags: str) -> Run:
        """Measures it once, as `loads.run` does."""
        return loads.run(self.server, self.load, *flags, request=self.request)

    def closed(self, concurrency: str, _number: int) -> Run:
        """Measures it with this many requests in flight, in any round."""
        return self.measure("--concurrency", concurrency)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every comparison."""
    parser.add_argument("models", help="a model repository")
    parser.add_argument("model", help="its model; version 1 is served as ONNX")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed ones of each load")
    parser.add_argument(
        "--calm", type=float, default=0.2, help="processors that others may take in such a round"
    )
    parser.add_argument("--tries", type=int, default=3, help="times as many rounds at most")
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="begin no round after so long"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--warmup-s", type=float, default=1.0, help="before it")
    parser.add_argument("--slo-ms", type=float, default=50)
    parser.add_argument("--flags", default="--device cpu", help="further flags of convoy-server")
    parser.add_argument(
        "--external",
        action="append",
        default=[],
        metavar="NAME=HOST:PORT[,PID]",
        help="another server of the protocol, with the process whose descendants are its own",
    )
    parser.add_argument(
        "--http",
        action="append",
        default=[],
        metavar="NAME=URL[,PID]",
        help="one that takes a bare tensor by POST",
    )
    parser.add_argument("--tensor", default="FP32:3,32,32", help="that tensor, DATATYPE:D,D,D")
    parser.add_argument(
        "--size-px", type=int, nargs=2, default=(32, 32), help="height and width, asked by REST"
    )


def turns(arguments: argparse.Namespace) -> Turns:
    """Return how many rounds the options ask for."""
    return Turns(arguments.rounds, arguments.tries, arguments.calm, arguments.limit_s)


def load_of(arguments: argparse.Namespace, images: int = 1) -> Load:
    """Return the requests that the options describe."""
    return Load(arguments.model, images, arguments.seconds, arguments.warmup_s, arguments.slo_ms)


def convoy_command(models: str, flags: str) -> list[str]:
    """Return how this project's server is started."""
    command = ["convoy.server", "--repository", models, "--port", "0", "--metrics-port", "0"]
    return [*command, "--log-format", "json", *flags.split()]


def externals(arguments: argparse.Namespace, load: Load) -> dict[str, Candidate]:
    """Return the servers that already run, by name."""
    found = {}
    for name, where, pid in map(_parse, arguments.external):
        found[name] = Candidate(Server(where, pid, float("nan")), load)
    for name, where, pid in map(_parse, arguments.http):
        request = HttpRequest(where, arguments.tensor)
        found[name] = Candidate(Server(where, pid, float("nan")), load, request)
    return found


def over_rest(candidate: Candidate, arguments: argparse.Namespace) -> Candidate:
    """Return a Convoy server that is asked for the same by binary REST."""
    height_px, width_px = arguments.size_px
    url = f"{candidate.server.url}/v2/models/{arguments.model}/infer"
    shape = f"{candidate.load.images},{height_px},{width_px},3"
    request = HttpRequest(url, f"UINT8:{shape}", "image")
    return Candidate(candidate.server, candidate.load, request)


def _parse(text: str) -> tuple[str, str, int]:
    name, _, rest = text.partition("=")
    where, _, pid = rest.partition(",")
    return name, where, int(pid or 0)


@contextmanager
def started(
    commands: Mapping[str, Sequence[str]], load: Load, others: Mapping[str, Candidate]
) -> Iterator[dict[str, Candidate]]:
    """Start servers of the protocol, all at once, and end them."""
    with ExitStack() as stack:
        found = {
            name: Candidate(stack.enter_context(serving(command)), load)
            for name, command in commands.items()
        }
        yield {**found, **others}
