"""The cost of following a large repository: 200 models, each with 5 versions.

    python -m benchmarks.repository_polling

Prints how long a listing takes, and the latency of requests in the same process with and without a
scan of the repository every half second, in alternating rounds. Every model's newest version is
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

from convoy.server.models.registry import ServedModel
from convoy.server.models.repository import ModelRepository
from tests.server.conftest import publish_version
from tests.server.models.test_manager import IMAGE, Live

MODELS, VERSIONS = 200, 5
ROUNDS, ROUND_S, EVERY_S = 7, 2.0, 0.5


def publish_all(models: Path) -> None:
    """Copy one hand-made version into all places, each with a manifest of its own."""
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
    """Send one request after the other for a time."""
    until_s = time.perf_counter() + seconds
    taken = []
    while (started_s := time.perf_counter()) < until_s:
        await model.batcher.infer(IMAGE)
        taken.append(1e3 * (time.perf_counter() - started_s))
    return np.array(taken)


async def measure(models: Path) -> None:
    """Run the rounds and print medians with the smallest and largest of them."""
    live = Live(models)
    await live.manager.start()
    repository = ModelRepository(models)
    model = live.models.find("model-0")
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
