"""Tests of what is written for CUDA; `tests/gpu/run.sh` runs them.

TEST_DEVICE=cpu runs on the CPU what of them means something there, so that the tests
themselves are known to work before a machine with a GPU is at hand.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convoy.server.backends.device import count_cuda_devices

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
Golden = dict[str, np.ndarray]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    without = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if DEVICE == "cuda" and not count_cuda_devices():
                item.add_marker(without)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def cuda(device: str) -> str:
    """For tests that mean nothing elsewhere."""
    if device != "cuda":
        pytest.skip("means something on CUDA only")
    return device


@pytest.fixture
def models(repository: Path, tmp_path: Path) -> Path:
    """A repository of one's own with `digits` in version 1."""
    return Path(shutil.copytree(repository, tmp_path / "models"))


@pytest.fixture
def golden(models: Path) -> Golden:
    with np.load(models / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return dict(samples)


def publish_again(
    models: Path, version: int, spoil: Callable[[Golden], None] | None = None
) -> None:
    """Publishes version 1 a second time, by one rename, with other golden samples if wished."""
    staged = Path(shutil.copytree(models / "digits" / "1", models.parent / f"staged-{version}"))
    manifest = json.loads((staged / "manifest.json").read_text())
    manifest["version"] = version
    if spoil:
        with np.load(staged / "samples.npz", allow_pickle=False) as samples:
            changed = dict(samples)
        spoil(changed)
        np.savez(staged / "samples.npz", **changed)
        content = (staged / "samples.npz").read_bytes()
        record = manifest["samples"]["file"]
        record["size_bytes"] = str(len(content))
        record["sha256"] = hashlib.sha256(content).hexdigest()
    (staged / "manifest.json").write_text(json.dumps(manifest))
    staged.rename(models / "digits" / str(version))
