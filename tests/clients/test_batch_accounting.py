"""One large job: links, broken files, repeated images, kills and a server restart, in every engine.

TEST_IMAGES sets its size; `make batch-test` runs it with 60,000 images, also on a Ray
cluster. The images are CIFAR-10's where its archive lies beside the checkout, else digits.
"""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.clients.batches import digit_files, read_rows
from tests.processes import running_server

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.gz"
ENGINES = ("ray", "local", "grpc") if find_spec("ray") else ("local", "grpc")
IMAGES = int(os.environ.get("TEST_IMAGES", "3000"))
TIMEOUT_S = max(300, IMAGES // 20)
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


def some_files(repository: Path) -> list[bytes]:
    """Images to choose from."""
    if not CIFAR.exists():
        return digit_files(repository)
    files = []
    with tarfile.open(CIFAR, "r|gz") as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                files.append(archive.extractfile(member).read())
            if len(files) == IMAGES:
                break
    return files


@pytest.fixture
def archive(repository: Path, tmp_path: Path) -> tuple[Path, list[str], set[str]]:
    """Returns a tar, the names of its images in order, and those of the broken ones."""
    files = some_files(repository)
    path, names, broken = tmp_path / "images.tar", [], set()
    draw = random.Random(8)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        sound: list[str] = []
        for number in range(IMAGES):
            name = f"{number % 10}/caf\xe9-{number:06}.png"
            member = tarfile.TarInfo(name)
            kind = draw.random()
            if sound and kind < 0.1:
                member.type, member.linkname = tarfile.LNKTYPE, draw.choice(sound)
                tar.addfile(member)
            else:
                content = files[number % len(files)]
                if kind > 0.95:
                    content = draw.choice([b"", b"no image", content[: len(content) // 2]])
                    broken.add(name)
                else:
                    sound.append(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            names.append(name)
            label = tarfile.TarInfo(f"{number:06}.cls")
            tar.addfile(label)
    return path, names, broken


def run_until_done(command: list[str], parts: Path, kills: int) -> int:
    """Runs a command, killing it `kills` times after progress; returns the times it was killed."""
    killed = 0
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            before = parts.stat().st_size if parts.exists() else 0
            while killed < kills and process.poll() is None:
                if parts.exists() and parts.stat().st_size > before:
                    process.send_signal(signal.SIGKILL if killed % 2 else signal.SIGTERM)
                    killed += 1
                    break
                time.sleep(0.002)
            _, stderr = process.communicate(timeout=TIMEOUT_S)
        # A job does not start while the server is down; the operator runs it again.
        is_down = process.returncode == 1 and b"all backends failing" in stderr
        if process.returncode not in (-signal.SIGKILL, 143) and not is_down:
            assert process.returncode == 0, stderr
            return killed


@contextmanager
def restarting_server(repository: Path, journal: Path) -> Iterator[str]:
    """Yields the address of a server that is killed and started again after the first parts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--device", "cpu", "--port", port)
    stopped, done = threading.Event(), threading.Event()

    def restart() -> None:
        while not stopped.is_set() and not (journal.exists() and journal.stat().st_size > 300):
            time.sleep(0.002)
        first.process.kill()
        first.process.wait()
        with running_server(repository, *flags):
            done.wait(TIMEOUT_S)

    with running_server(repository, *flags) as first:
        restarting = threading.Thread(target=restart)
        restarting.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            stopped.set()
            done.set()
            restarting.join()


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Yields the address of a cluster of two nodes."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 * 1024 * 1024}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.filterwarnings("default")
def test_each_input_has_one_row_with_the_same_label_in_each_engine(repository, archive, tmp_path):
    path, names, broken = archive
    tables = {}
    for engine in ENGINES:
        out = tables[engine] = tmp_path / f"{engine}.jsonl"
        command = [sys.executable, "-m", "convoy.client", "batch", str(path), "--out", str(out)]
        command += ["--engine", engine, "--part-size", str(max(50, IMAGES // 60))]
        command += ["--repository", str(repository)]
        journal = tmp_path / f"{out.name}.parts" / "journal"
        with {
            "local": nullcontext,
            "grpc": partial(restarting_server, repository, journal),
            "ray": ray_cluster,
        }[engine]() as address:
            command += ["--address", address] * (address is not None)
            started_s = time.monotonic()
            assert run_until_done(command, journal, kills=3) == 3
            seconds = time.monotonic() - started_s
        print(f"{engine}: {IMAGES} images, 3 kills, {seconds:.0f} s")
    rows = {engine: read_rows(out) for engine, out in tables.items()}
    escaped = [name.replace("\xe9", "\\xe9") for name in names]
    for engine, table in rows.items():
        assert [row["path"] for row in table] == escaped, engine
        assert {row["path"] for row in table if row["error"]} == {
            name.replace("\xe9", "\\xe9") for name in broken
        }
    labels = [[(row["label"], row["error"]) for row in table] for table in rows.values()]
    assert all(each == labels[0] for each in labels)
    for out in tables.values():
        summary = json.loads(Path(f"{out}.summary.json").read_text())
        assert summary["images"] == IMAGES == summary["classified"] + summary["errors"]
        assert summary["errors"] == len(broken) == sum(summary["errors_by_reason"].values())
        assert sum(summary["classes"].values()) == summary["classified"]
        assert summary["versions"] == {"digits/1": summary["classified"]}
        assert summary["left_out"] == {"not named like an image": IMAGES}
        counted = Counter(row["label"] for row in read_rows(out) if not row["error"])
        assert summary["classes"] == counted
