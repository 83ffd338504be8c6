"""Speed and memory of `convoy-client batch` on a folder of small images.

    python -m benchmarks.batch speed FOLDER --repository MODELS [--images 8000] [--rounds 5]
        [--device cuda]
    python -m benchmarks.batch memory FOLDER --repository MODELS [--rows 1000000]

`speed` runs, in turns: decoding alone, in as many processes as there are processors; ONNX Runtime
alone, on decoded pixels, with the batch size, threads and concurrent runs of the engine; a job with
`--engine local`; a job with `--engine grpc` and a server on the same processors. Reading files is
part of decoding, writing the table is part of a job. The bound for `local` is decoding plus ONNX
Runtime, one after the other, each on all processors. Beside other work compare the processor time,
which is that of all processes of a run.

`memory` repeats the images until the list has `--rows` rows, and reads the resident memory of the
process while it runs.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import operator
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from convoy.client.batch import (
    BatchJob,
    Engine,
    GrpcEngine,
    Input,
    LocalEngine,
    LocalModel,
    Predictor,
    RemoteModel,
    run_batch,
)
from convoy.client.batch.decoding import Preprocessing, decode_batch
from convoy.client.batch.items import Item, batched
from tests.processes import running_server

BATCH_SIZE = 64


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    time_s: float
    processor_s: float


def list_images(folder: Path, count: int, listing: Path) -> None:
    """Write a list of `count` images below a folder, the same ones again if they are fewer."""
    found = sorted(path for path in folder.rglob("*") if path.suffix == ".jpg")
    listing.write_text("".join(f"{p}\n" for p in itertools.islice(itertools.cycle(found), count)))


def decode(steps: Preprocessing, paths: Sequence[str]) -> int:
    return len(decode_batch([Item(path, path) for path in paths], steps).pixels)


def timed(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def processor_s(others: Sequence[int]) -> float:
    """Processor time of this process, and of other processes by their threads that still run."""
    tasks = (task for pid in others for task in Path(f"/proc/{pid}/task").iterdir())
    spent_ns = 0
    for task in tasks:
        # A thread may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            spent_ns += int((task / "schedstat").read_text().split()[0])
    return time.process_time() + spent_ns / 1e9


def job_s(listing: Path, engine: Engine, suffix: str) -> float:
    """Seconds of a job, from the first image to the finished table."""
    with tempfile.TemporaryDirectory() as folder:
        job = BatchJob(Input(str(listing)), Path(folder) / f"out{suffix}")
        engine.labels()
        return timed(lambda: run_batch(job, engine))


def measure_speed(arguments: argparse.Namespace, listing: Path) -> None:
    list_images(arguments.folder, arguments.images, listing)
    local = LocalModel(arguments.repository, device=arguments.device)
    predictor = Predictor(local, top_k=1)
    chunks = list(batched(listing.read_text().splitlines(), BATCH_SIZE))
    decoded = [decode_batch([Item(p, p) for p in chunk], predictor.steps) for chunk in chunks]
    spawn = multiprocessing.get_context("spawn")
    processes = len(os.sched_getaffinity(0))
    flags = ("--device", arguments.device, *arguments.server_flags.split())
    with (
        ProcessPoolExecutor(processes, spawn) as pool,
        ThreadPoolExecutor(predictor.instances) as device,
        running_server(arguments.repository, *flags) as server,
    ):
        work = partial(decode, predictor.steps)
        remote = RemoteModel(server.address, predictor_name(predictor), 0, 1, 30.0, 512, 60.0)
        candidates: dict[str, Callable[[], float]] = {
            "decoding": lambda: timed(lambda: sum(pool.map(work, chunks))),
            "ONNX Runtime": lambda: timed(lambda: list(device.map(predictor.run, decoded))),
            "local": lambda: job_s(listing, LocalEngine(predictor, BATCH_SIZE, 0), ".csv"),
            "grpc": lambda: job_s(listing, GrpcEngine(remote), ".csv"),
        }
        for run in candidates.values():
            run()
        others = [server.process.pid, *(child.pid for child in multiprocessing.active_children())]

        def measured(run: Callable[[], float]) -> Cost:
            before_s = processor_s(others)
            return Cost(run(), processor_s(others) - before_s)

        rounds = [
            {name: measured(run) for name, run in candidates.items()}
            for _ in range(arguments.rounds)
        ]
    report(rounds, arguments.images)


def predictor_name(predictor: Predictor) -> str:
    return str(predictor.identity["model"])


def report(rounds: Sequence[dict[str, Cost]], images: int) -> None:
    for name in rounds[0]:
        show(name, [images / each[name].time_s for each in rounds], "{:.0f} images/s")
        spent_us = [each[name].processor_s / images * 1e6 for each in rounds]
        show(f"{name}, processor time of an image", spent_us, "{:.0f} us")
    for what, cost in (
        ("rate", operator.attrgetter("time_s")),
        ("processor time", operator.attrgetter("processor_s")),
    ):
        costs = [{name: cost(found) for name, found in each.items()} for each in rounds]
        shares = [(each["decoding"] + each["ONNX Runtime"]) / each["local"] for each in costs]
        show(f"{what}: local / (decoding + ONNX Runtime)", shares)
        show(f"{what}: grpc / local", [each["local"] / each["grpc"] for each in costs])
    busy = [each["ONNX Runtime"].time_s / each["local"].time_s for each in rounds]
    show("ONNX Runtime / local, the share of the time that the device is busy", busy)


def show(name: str, values: Sequence[float], form: str = "{:.2f}") -> None:
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    print(f"{name}: {middle} ({low} to {high})")


def measure_memory(arguments: argparse.Namespace, listing: Path) -> None:
    list_images(arguments.folder, arguments.rows, listing)
    out = listing.with_name("out.csv")
    command = [sys.executable, "-m", "convoy.client", "batch", str(listing), "--out", str(out)]
    command += ["--engine", "local", "--repository", str(arguments.repository)]
    journal = out.with_name("out.csv.parts") / "journal"
    with subprocess.Popen(command) as process:
        parts, peak = 0, 0.0
        while process.poll() is None:
            done = journal.read_bytes().count(b"\n") if journal.exists() else 0
            if done and (parts == 0 or done >= 2 * parts):
                parts = done
                print(f"{parts} parts: {resident_mib(process.pid, 'VmRSS'):.0f} MiB", flush=True)
            peak = resident_mib(process.pid, "VmHWM") or peak
            time.sleep(0.2)
    print(f"peak {peak:.0f} MiB, {sum(1 for _ in out.open()) - 1} rows")


def resident_mib(process: int, name: str) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--server-flags", default="", help="more flags of convoy-server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = {"speed": measure_speed, "memory": measure_memory}[arguments.what]
        measure(arguments, Path(folder) / "images.txt")


if __name__ == "__main__":
    main()
