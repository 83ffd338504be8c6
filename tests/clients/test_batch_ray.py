"""The engine `ray` on a cluster of two local nodes. Run by `make ray-test`, which installs Ray."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clients.batch import BatchJob, Input, run_batch
from tests.clients.batches import (
    assert_same_rows,
    digit_files,
    local_engine,
    read_rows,
    write_images,
)

pytest.importorskip("ray", reason="extra `ray` is not installed; make ray-test does")

pytestmark = [pytest.mark.timeout(500), pytest.mark.filterwarnings("default")]


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    store = {"num_cpus": 1, "object_store_memory": 100 * 1024 * 1024}
    nodes = Cluster(initialize_head=True, head_node_args=store)
    nodes.second = nodes.add_node(**store)
    yield nodes
    nodes.shutdown()


def start(source: object, out: Path, repository: Path, address: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "clients", "batch", str(source), "--out", str(out)]
    command += ["--engine", "ray", "--address", address, "--repository", str(repository)]
    command += ["--top-k", "3", "--batch-size", "16", "--part-size", "64"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def local_rows(source: Path, repository: Path) -> list[dict]:
    out = source.parent / "local.jsonl"
    engine = local_engine(repository, top_k=3, batch_size=16)
    run_batch(BatchJob(Input(str(source)), out, top_k=3), engine)
    return read_rows(out)


def test_a_cluster_gives_the_rows_of_the_local_engine_also_when_a_node_is_killed(
    cluster, repository, tmp_path
):
    folder = tmp_path / "images"
    write_images(folder, digit_files(repository), 3000)
    (folder / "broken.png").write_bytes(b"no image")
    expected = local_rows(folder, repository)

    whole = start(folder, tmp_path / "whole.jsonl", repository, cluster.address)
    _, stderr = whole.communicate(timeout=200)
    assert whole.returncode == 0, stderr
    assert_same_rows(read_rows(tmp_path / "whole.jsonl"), expected)

    out = tmp_path / "killed.jsonl"
    journal = tmp_path / "killed.jsonl.parts" / "journal"
    process = start(folder, out, repository, cluster.address)
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    assert process.poll() is None
    cluster.remove_node(cluster.second, allow_graceful=False)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert_same_rows(read_rows(out), expected)


def test_an_array_through_a_cluster(cluster, repository, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (200, 40, 50, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    out = tmp_path / "ray.jsonl"
    process = start(tmp_path / "images.npy", out, repository, cluster.address)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert_same_rows(read_rows(out), local_rows(tmp_path / "images.npy", repository))


def test_a_cluster_that_is_not_there_is_one_line(repository, tmp_path):
    write_images(tmp_path / "images", digit_files(repository), 3)
    process = start(tmp_path / "images", tmp_path / "out.csv", repository, "127.0.0.1:1")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert stderr.startswith("convoy-client: --address: ")
    assert stderr.count("\n") == 1, stderr
