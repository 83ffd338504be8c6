"""The engine `ray` on a cluster of two local nodes. Run by `make ray-test`, which installs Ray."""

import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from convoy.client.batch import BatchJob, Input, LocalModel, run_batch
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
    command = [sys.executable, "-m", "convoy.client", "batch", str(source), "--out", str(out)]
    command += ["--engine", "ray", "--address", address, "--repository", str(repository)]
    command += ["--top-k", "3", "--batch-size", "16", "--part-size", "64"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def local_rows(source: Path, repository: Path) -> list[dict]:
    out = source.parent / f"{source.name}.local.jsonl"
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


def test_a_missing_cluster_is_one_line(repository, tmp_path):
    write_images(tmp_path / "images", digit_files(repository), 3)
    process = start(tmp_path / "images", tmp_path / "out.csv", repository, "127.0.0.1:1")
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert stderr.startswith("convoy-client: --address: ")
    assert stderr.count("\n") == 1, stderr


def test_archives_through_a_cluster(cluster, repository, tmp_path):
    """An uncompressed tar is read in shares, a compressed one by one task; links are images."""
    files = digit_files(repository)
    names = []
    for suffix in ("tar", "tar.gz"):
        path = tmp_path / f"images.{suffix}"
        names.append(str(path))
        with tarfile.open(path, f"w:{suffix[4:]}" if "." in suffix else "w") as archive:
            for number in range(100):
                member = tarfile.TarInfo(f"{number:04}.png")
                if number % 10 == 9:
                    member.type, member.linkname = tarfile.LNKTYPE, f"{number - 1:04}.png"
                    archive.addfile(member)
                else:
                    member.size = len(files[number % len(files)])
                    archive.addfile(member, io.BytesIO(files[number % len(files)]))
    out = tmp_path / "ray.jsonl"
    command = [sys.executable, "-m", "convoy.client", "batch", *names, "--out", str(out)]
    command += ["--engine", "ray", "--address", cluster.address, "--repository", str(repository)]
    result = subprocess.run(
        [*command, "--batch-size", "16"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    job = BatchJob(Input(tuple(names)), tmp_path / "local.jsonl")
    run_batch(job, local_engine(repository))
    assert len(read_rows(out)) == 200
    assert_same_rows(read_rows(out), read_rows(tmp_path / "local.jsonl"))


def test_a_data_set_of_ray_in_and_out(cluster, repository, tmp_path):
    import ray

    from convoy.client.batch.cluster import classify_dataset

    files = [*digit_files(repository), b"no image"]
    ray.init(cluster.address, log_to_driver=False)
    try:
        records = [{"id": number, "image": files[number % 17]} for number in range(170)]
        model = LocalModel(repository)
        found = classify_dataset(ray.data.from_items(records), model, batch_size=16, actors=(1, 2))
        rows = sorted(found.take_all(), key=lambda row: row["id"])
    finally:
        ray.shutdown()
    for number, content in enumerate(files):
        (tmp_path / f"{number:03}.png").write_bytes(content)
    expected = local_rows(tmp_path, repository)
    assert [row["id"] for row in rows] == list(range(170))
    for row in rows:
        local = expected[row["id"] % 17]
        assert (row["label"], row["error"]) == (local["label"], local["error"])
        assert bool(row["error"]) == (row["id"] % 17 == 16)
