"""`make demo`: train, export, serve and classify real handwritten digits, then read the metrics.

Each step is the console command that the README names, in a process of its own, in a temporary
folder.
"""

import asyncio
import io
import itertools
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from clients import AsyncClient, Classification
from tests.processes import running_server
from training.checkpoints import load
from training.data import ImageSet, load_data

LEAST_ACCURACY = 0.95
QUANTILES = (0.5, 0.9, 0.99)

console = Console()


def main() -> None:
    """Runs the whole chain; exits 1 if the served accuracy is not the offline one."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="convoy-demo-") as temporary:
        folder = Path(temporary)
        run("convoy-train --data digits --model net_res_deep --out runs/digits", folder)
        run("convoy-export runs/digits/best.pt --repository models --name digits", folder)
        checkpoint = load(folder / "runs/digits/best.pt")
        offline = checkpoint.metrics["test_accuracy"]
        test = load_data(checkpoint.data.spec, checkpoint.data.preprocessing).test
        show("convoy-server --repository models")
        with running_server(folder / "models") as server:
            console.print(f"serving on {server.address}, metrics on {server.http}/metrics")
            served, elapsed_s = asyncio.run(classify(test, server.address))
            with urllib.request.urlopen(f"{server.http}/metrics") as reply:
                metrics = reply.read().decode()
    console.print(
        f"\n{len(test)} real test digits as PNG files through gRPC in {elapsed_s:.1f} s\n"
        f"accuracy through the server {served:.4f}, offline {offline:.4f}\n"
    )
    console.print(latencies(metrics))
    console.print(f"\nEverything is shut down after {time.monotonic() - started_s:.0f} s.")
    console.print("How to go on: the five-minute tour in README.md does this step by step.")
    if served < LEAST_ACCURACY or abs(served - offline) > 1e-6:
        sys.exit(f"expected the offline accuracy, at least {LEAST_ACCURACY}, got {served:.4f}")


def show(command: str) -> None:
    """Prints a command as it would be typed."""
    console.print(f"\n[bold]$ {command}[/bold]")


def run(command: str, folder: Path) -> None:
    """Shows a console command of this environment and runs it in a folder."""
    show(command)
    program, *arguments = shlex.split(command)
    subprocess.run([Path(sys.executable).parent / program, *arguments], cwd=folder, check=True)


async def classify(test: ImageSet, address: str) -> tuple[float, float]:
    """Sends every image as a PNG file; returns the accuracy and the seconds it took."""
    files = [png(image) for image in test.images]
    started_s = time.monotonic()
    async with AsyncClient(address) as client:
        answers = [answer async for answer in client.classify_many(files, model="digits")]
    correct = [
        isinstance(answer, Classification) and answer.best.index == label
        for answer, label in zip(answers, test.labels, strict=True)
    ]
    return sum(correct) / len(correct), time.monotonic() - started_s


def png(pixels: object) -> bytes:
    """Encodes pixels `[H, W, 3]`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def latencies(metrics: str) -> Table:
    """Reads the duration histograms back from the text of /metrics."""
    table = Table("milliseconds", *(f"p{100 * q:g}" for q in QUANTILES), title="/metrics says")
    for family in text_string_to_metric_families(metrics):
        if family.name.endswith("_duration_seconds"):
            buckets = [
                (float(sample.labels["le"]), sample.value)
                for sample in family.samples
                if sample.name.endswith("_bucket")
                and sample.labels.get("method", "Classify") == "Classify"
            ]
            stage = family.name.removeprefix("convoy_").removesuffix("_duration_seconds")
            table.add_row(stage, *(f"{1000 * quantile(q, buckets):.2f}" for q in QUANTILES))
    return table


def quantile(q: float, buckets: list[tuple[float, float]]) -> float:
    """Interpolates inside a cumulative bucket as Prometheus's histogram_quantile does."""
    wanted = q * buckets[-1][1]
    for (low, below), (high, upto) in itertools.pairwise([(0.0, 0.0), *buckets]):
        if upto >= wanted:
            return (
                low
                if high == float("inf")
                else low + (high - low) * (wanted - below) / (upto - below)
            )
    raise ValueError("the histogram is empty")


if __name__ == "__main__":
    main()
