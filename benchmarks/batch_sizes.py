"""How far the batch sizes depend on the moment of the start.

    python -m benchmarks.batch_sizes MODELS MODEL --starts 20 --disturbing 2

Loads the newest version again and again, as the server does at its start, while other processes
take the processors at random times. Then measures what the chosen preferred sizes are worth: each
of them runs in turn on two threads, undisturbed. Prints how often which sizes were chosen, the
time of a load, and the images a second of each preferred size.
"""

import argparse
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.raw_onnx import images_per_s, open_session
from convoy.server.assembly import load_options
from convoy.server.backends.device import Device
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import ModelLoader
from convoy.server.settings import parse_settings


def disturb(seed: int) -> None:
    """Use a processor for 1 to 100 ms and leave it for as long, again and again."""
    random_ = random.Random(seed)
    while True:
        end_s = time.perf_counter() + random_.uniform(0.001, 0.1)
        while time.perf_counter() < end_s:
            pass
        time.sleep(random_.uniform(0.001, 0.1))


@contextmanager
def disturbances(processes: int) -> Iterator[None]:
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=disturb, args=(n,), daemon=True) for n in range(processes)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def choose(folder: Path, flags: str) -> tuple[int, int, float]:
    """Load a version; return its preferred and its largest batch size and the time it took."""
    settings = parse_settings(["--repository", str(folder.parent.parent), *flags.split()])
    options = load_options(settings, (Device("cpu"),))
    started_s = time.perf_counter()
    model = ModelLoader(options, ServerMetrics(CollectorRegistry())).load(folder)
    load_s = time.perf_counter() - started_s
    snapshot = model.batcher.snapshot()
    for backend in model.backends:
        backend.close()
    return snapshot.preferred_batch_size, snapshot.max_batch_size, load_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("model")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--disturbing", type=int, default=2, help="processes")
    parser.add_argument("--flags", default="", help="of convoy-server, such as --warmup-s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    versions = (arguments.models / arguments.model).iterdir()
    folder = max(
        (each for each in versions if each.name.isdigit()), key=lambda each: int(each.name)
    )
    with disturbances(arguments.disturbing):
        chosen = [choose(folder, arguments.flags) for _ in range(arguments.starts)]
    for (preferred, largest), starts in Counter(each[:2] for each in chosen).most_common():
        print(f"preferred {preferred}, largest {largest}: {starts} starts")
    loads_s = sorted(load_s for *_, load_s in chosen)
    print(f"load: {statistics.median(loads_s):.2f} s [{loads_s[0]:.2f}-{loads_s[-1]:.2f}]")
    session = open_session(str(folder / "model.onnx"), threads=1)
    sizes = sorted({each[0] for each in chosen})
    rounds = [
        {size: images_per_s(session, size, 2, arguments.seconds) for size in sizes}
        for _ in range(arguments.rounds)
    ]
    for size in sizes:
        rate = statistics.median(each[size] for each in rounds)
        ratio = statistics.median(each[size] / max(each.values()) for each in rounds)
        print(f"batches of {size}: {rate:.0f} images/s, {ratio:.3f} of the best in a round")


if __name__ == "__main__":
    main()
