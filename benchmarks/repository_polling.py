"""What a large repository costs a server that follows it: 200 models, each with 5 versions.

    python -m benchmarks.repository_polling

Prints how long a listing takes, and the latency of requests in the same process with and without a
look into the repository every half second, in alternating rounds. Every model's newest version is
loaded and served.
"""

import asyncio
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import structlog

from server.repository import ModelRepository
from server.served_model import ServedModel
from tests.server.conftest import publish_version
from tests.server.test_manager import IMAGE, Live

MODELS, VERSIONS = 200, 5
ROUNDS, ROUND_S, EVERY_S = 7, 2.0, 0.5


def publish_all(models: Path) -> None:
    """Copies one hand-made version into all places, each with a manifest of its own."""
    first = publish_version(models / "model-0" / "1")
    manifest = json.loads((first / "manifest.json").read_text())
    for model in range(MODELS):
        for version in range(1, VERSIONS + 1):
            folder = models / f"model-{model}" / str(version)
            if folder != first:
                shutil.copytree(first, folder)
            named = {**manifest, "name": folder.parent.name, "version": version}
            (folder / "manifest.json").write_text(json.dumps(named))


async def latencies_ms(model: ServedModel, seconds: float) -> np.ndarray:
    """Sends one request after the other for a time."""
    until_s = time.perf_counter() + seconds
    taken = []
    while (started_s := time.perf_counter()) < until_s:
        await model.batcher.infer(IMAGE)
        taken.append(1e3 * (time.perf_counter() - started_s))
    return np.array(taken)


async def measure(models: Path) -> None:
    """Runs the rounds and prints medians with the smallest and largest of them."""
    live = Live(models)
    await live.manager.start()
    repository = ModelRepository(models)
    model = live.catalogue.find("model-0")
    listing, rounds = [], {"without": [], "with": []}
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        repository.models()
        listing.append(1e3 * (time.perf_counter() - started_s))
        for kind, taken in rounds.items():
            polling = asyncio.create_task(live.manager.poll(EVERY_S)) if kind == "with" else None
            taken.append(np.percentile(await latencies_ms(model, ROUND_S), (50, 99)))
            if polling:
                polling.cancel()
    print(f"{len(live.served)} models served of {MODELS * VERSIONS} versions")
    print(f"listing {_spread(listing)} ms")
    for kind, taken in rounds.items():
        p50, p99 = zip(*taken, strict=True)
        print(f"{kind} polling: p50 {_spread(p50)} ms, p99 {_spread(p99)} ms")
    await live.manager.close()


def _spread(values: object) -> str:
    numbers = sorted(map(float, values))  # type: ignore[call-overload]
    return f"{statistics.median(numbers):.2f} ({numbers[0]:.2f} to {numbers[-1]:.2f})"


def main() -> None:
    """Measures in a temporary folder."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        publish_all(models)
        asyncio.run(measure(models))


if __name__ == "__main__":
    main()
