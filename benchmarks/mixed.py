"""Image files and pixels at one server: requests of each alone, and of both at the same time.

    python -m benchmarks.mixed MODELS small --files 4 --pixels 32 --rounds 5

Files are JPEGs of 1500 x 1000 px, which take the server much longer to decode than the model to
run; pixels need no decoding. Each kind has its own client with so many requests in flight. Prints
requests/s and the p90, median [least-greatest] over the rounds. The shares of a kind's own rate add
up to about 1 if neither kind starves and nothing is wasted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.decoding import photographs
from benchmarks.processes import serving
from benchmarks.tables import spread, table

KINDS = ("files", "pixels")


def start(address: str, arguments: argparse.Namespace, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "convoy.client", "bench", "--address", address, "--json"]
    command += ["--model", arguments.model, "--metrics", "none", "--processes", "1"]
    command += ["--duration-s", f"{arguments.seconds:g}", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(client: subprocess.Popen[str]) -> tuple[float, float]:
    """Return requests/s and the p90 in ms of a client that ends."""
    printed, _ = client.communicate()
    if client.returncode:
        raise SystemExit(f"the client failed: {client.args!r}")
    (run,) = json.loads(printed)["runs"]
    return run["throughput_per_s"], 1000 * run["latency_s"]["p90"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="a model repository")
    parser.add_argument("model")
    parser.add_argument("--files", type=int, default=4, help="requests in flight with files")
    parser.add_argument("--pixels", type=int, default=32, help="requests in flight with pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    command = ["convoy.server", "--repository", str(arguments.models), "--device", "cpu"]
    command += ["--port", "0", "--metrics-port", "0", "--log-format", "json"]
    alone, both = ({kind: [] for kind in KINDS} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder, serving(command) as server:
        paths = [Path(folder) / f"{number}.jpg" for number in range(8)]
        for path, file in zip(paths, photographs(len(paths)), strict=True):
            path.write_bytes(file)
        flags = {
            "files": [*map(str, paths), "--concurrency", str(arguments.files)],
            "pixels": ["--payload", "raw", "--concurrency", str(arguments.pixels)],
        }
        for _ in range(arguments.rounds):
            for kind in KINDS:
                alone[kind].append(result(start(server.address, arguments, *flags[kind])))
            clients = [start(server.address, arguments, *flags[kind]) for kind in KINDS]
            for kind, client in zip(KINDS, clients, strict=True):
                both[kind].append(result(client))
    shares = {
        kind: [
            after / before for (before, _), (after, _) in zip(alone[kind], both[kind], strict=True)
        ]
        for kind in KINDS
    }
    rows = []
    for kind in KINDS:
        cells = [
            spread(list(values), digits)
            for found in (alone, both)
            for values, digits in zip(zip(*found[kind], strict=True), (0, 1), strict=True)
        ]
        rows.append(
            [f"{kind}, {getattr(arguments, kind)} in flight", *cells, spread(shares[kind], 2)]
        )
    print(table(["requests", "alone, /s", "p90 ms", "both, /s", "p90 ms", "share"], rows))
    print(f"shares of both: {statistics.median(map(sum, zip(*shares.values(), strict=True))):.2f}")


if __name__ == "__main__":
    main()
