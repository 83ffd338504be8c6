"""What the tests of batch inference share: images in folders, and tables read back."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from convoy.client.batch import Input, LocalEngine, LocalModel, Predictor
from convoy.client.batch.items import Item


def digit_files(repository: Path) -> list[bytes]:
    """Real digits as PNG files, from the golden samples of a version."""
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return [
            samples["encoded"][start:stop].tobytes()
            for start, stop in pairwise(samples["encoded_offsets"])
        ]


def write_images(folder: Path, files: list[bytes], count: int) -> list[str]:
    """Writes `count` images, some in folders of folders; returns their names, sorted."""
    names = [f"{'deep/' * (number % 3)}{number:05}.png" for number in range(count)]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[number % len(files)])
    return sorted(names)


def local_engine(repository: Path, top_k: int = 1, batch_size: int = 16) -> LocalEngine:
    """The engine `local` on the CPU."""
    return LocalEngine(Predictor(LocalModel(repository), top_k), batch_size, decoders=2)


def read_items(source: Input, folder: Path, start: int = 0) -> list[Item]:
    """All items of an input."""
    return list(source.open(folder).items(start))


def read_rows(path: Path) -> list[dict]:
    """The rows of a table of any format, with Python's values."""
    match path.suffix:
        case ".parquet":
            return pq.read_table(path).to_pylist()
        case ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_rows(one: list[dict], other: list[dict]) -> None:
    """Rows are equal; probabilities within 1e-6: another batch size changes the last digits."""
    approximate = ("probability", "probabilities")
    for left, right in zip(one, other, strict=True):
        for name in approximate:
            assert left[name] == pytest.approx(right[name], abs=1e-6)
        assert left | dict.fromkeys(approximate) == right | dict.fromkeys(approximate)
