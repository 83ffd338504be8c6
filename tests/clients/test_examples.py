"""Every file of the folder examples is run as it stands, against a real server process."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import httpx
import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from celery.contrib.testing.worker import start_worker
from nbclient import NotebookClient
from PIL import Image

from convoy.client import InvalidRequestError
from tests.needs import needs_program

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED = {
    "celery_tasks.py",
    "classify.ipynb",
    "dataloader_workers.py",
    "demo.py",  # `.ci/run` runs it: make demo
    "fastapi_gateway.py",
    "gunicorn_app.py",
    "spark_classify.py",
}
STARTED_WITHIN_S = 100


@pytest.fixture
def seven(repository, tmp_path, server, monkeypatch) -> tuple[Path, str]:
    """An image and the label that the exported network gives it."""
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        pixels, label = samples["images"][7], str(samples["logits"][7].argmax())
    path = tmp_path / "seven.png"
    Image.fromarray(pixels).save(path)
    monkeypatch.setenv("CONVOY_ADDRESS", server.address)
    return path, label


def test_every_example_is_tested():
    found = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert found == TESTED


def load(name: str) -> ModuleType:
    """Imports an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_a_fastapi_gateway(seven):
    path, label = seven
    gateway = load("fastapi_gateway")
    transport = httpx.ASGITransport(gateway.app)
    async with (
        gateway.app.router.lifespan_context(gateway.app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as http,
    ):
        answer = await http.post("/classify", content=path.read_bytes())
        assert (answer.status_code, answer.json()["label"]) == (200, label)
        wrong = await http.post("/classify", content=b"no image")
        assert wrong.status_code == 400
        assert "expected a JPEG" in wrong.json()["detail"]


def test_gunicorn_workers(seven):
    path, label = seven
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2"]
    command += ["--bind", f"127.0.0.1:{port}", "gunicorn_app:app"]
    with subprocess.Popen(command, cwd=EXAMPLES, stderr=subprocess.PIPE) as process:
        try:
            workers = set()
            for _ in range(200):
                answer = post(port, path.read_bytes())
                assert answer["label"] == label
                workers.add(answer["worker"])
                if len(workers) == 2:
                    break
            assert process.pid not in workers
            assert workers
        finally:
            process.terminate()
            process.communicate(timeout=60)


def post(port: int, content: bytes) -> dict:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", content)
    for _ in range(STARTED_WITHIN_S * 10):
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError:
            raise
        except OSError:  # the workers are not there yet
            time.sleep(0.1)
    raise TimeoutError("gunicorn did not start")


def test_workers_of_a_data_loader(seven):
    path, label = seven
    command = [sys.executable, EXAMPLES / "dataloader_workers.py", *[str(path)] * 5]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{path} {label}"] * 5


def test_celery_tasks(seven):
    path, label = seven
    tasks = load("celery_tasks")
    with start_worker(tasks.app, pool="threads", perform_ping_check=False), tasks.client():
        answer = tasks.classify.delay(str(path)).get(timeout=100)
        assert (answer["path"], answer["label"]) == (str(path), label)
        with pytest.raises(InvalidRequestError, match="expected a JPEG"):
            tasks.classify.delay(__file__).get(timeout=100)


@needs_program("java", "default-jre-headless")
def test_a_spark_table(seven, tmp_path):
    pytest.importorskip("pyspark", reason="needs pyspark: make spark-test installs it")
    path, label = seven
    contents = [path.read_bytes(), b"no image"] * 20
    table = pa.table({"id": range(40), "image": pa.array(contents, pa.binary())})
    pq.write_table(table, tmp_path / "images.parquet")
    command = [sys.executable, EXAMPLES / "spark_classify.py"]
    command += [tmp_path / "images.parquet", tmp_path / "labels"]
    # Spark's workers would run the first python3 of PATH.
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    rows = pq.read_table(tmp_path / "labels").sort_by("id").to_pylist()
    assert [row["id"] for row in rows] == list(range(40))
    assert [row["label"] for row in rows] == [label, None] * 20
    assert all(bool(row["error"]) == row["id"] % 2 for row in rows)


@pytest.mark.filterwarnings("default")
def test_a_notebook(seven):
    path, label = seven
    notebook = nbformat.read(EXAMPLES / "classify.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources)
    client.execute(env=dict(os.environ))
    shown = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    assert shown[0] == "[('digits', 1, 10)]"
    assert shown[1].startswith(f"[('{label}', ")
    assert shown[2] == str([label] * 3)
