"""convoy-client as a process, against a real server process."""

import json
import subprocess
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import convoy.client
from tests.processes import ServerProcess, run_module


@pytest.fixture(scope="module")
def digits(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Real digits as PNG files, with the class that the exported net gives them."""
    folder = tmp_path_factory.mktemp("digits")
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        classes = samples["logits"].argmax(axis=1)
        files = [
            samples["encoded"][start:stop].tobytes()
            for start, stop in pairwise(samples["encoded_offsets"])
        ]
    expected = {}
    for number, (file, index) in enumerate(zip(files, classes, strict=True)):
        path = folder / f"{number:02}.png"
        path.write_bytes(file)
        expected[path] = str(index)
    return expected


def client(server: ServerProcess, *arguments: object) -> subprocess.CompletedProcess:
    return run_module("convoy.client", *arguments, "--address", server.address)


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("convoy-client: ")
    for word in words:
        assert word in result.stderr


def test_classify_prints_the_most_probable_classes(server, digits):
    result = client(server, "classify", *digits, "--model", "digits", "--top-k", "2")
    assert result.returncode == 0, result.stderr
    for line, (path, label) in zip(result.stdout.splitlines(), digits.items(), strict=True):
        assert line.startswith(f"{path}: {label} ")
        assert line.count("%") == 2


def test_classify_as_json(server, digits):
    result = client(server, "classify", *digits, "--json", "--top-k", "10")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["classes"][0]["label"] for answer in answers] == list(digits.values())
    for answer in answers:
        assert len(answer["classes"]) == 10
        assert sum(c["probability"] for c in answer["classes"]) == pytest.approx(1, abs=1e-5)


def test_one_bad_file_is_named_and_the_others_are_answered(server, digits, tmp_path):
    good, broken = next(iter(digits)), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    result = client(server, "classify", broken, tmp_path / "missing.png", good)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{good}: ")
    first, second = result.stderr.splitlines()
    assert first == (
        f"convoy-client: {broken}: image: expected a JPEG, PNG, WEBP, BMP, GIF file, "
        "got 8 other bytes"
    )
    assert second == f"convoy-client: {tmp_path / 'missing.png'}: No such file or directory"


def test_usage_errors_are_one_line(server, digits, tmp_path):
    image = next(iter(digits))
    assert_one_line(
        client(server, "classify", image, "--model", "cats"), "one of digits, got 'cats'"
    )
    assert_one_line(client(server, "classify"), "images")
    assert_one_line(client(server, "dance"), "dance")
    assert_one_line(client(server, "batch", tmp_path, "--out", tmp_path / "o.csv"), "no image")
    assert_one_line(
        client(server, "batch", tmp_path / "x", "--out", tmp_path / "p.csv"), "No such file"
    )
    assert not list(tmp_path.iterdir())


def test_a_batch_job_that_never_started_blocks_no_other(server, digits, tmp_path):
    out = tmp_path / "out.csv"
    assert_one_line(client(server, "batch", tmp_path / "missing", "--out", out), "No such file")
    result = client(server, "batch", next(iter(digits)).parent, "--out", out)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "out.csv.summary.json"}


def test_an_unreachable_server_is_one_line(digits):
    command = ("classify", next(iter(digits)), "--address", "127.0.0.1:1", "--timeout-s", "2")
    assert_one_line(run_module("convoy.client", *command), "127.0.0.1:1")
    assert_one_line(run_module("convoy.client", "health", "--address", "127.0.0.1:1"))


def test_health(server):
    assert client(server, "health").returncode == 0
    assert client(server, "health", "--model", "digits").returncode == 0
    assert_one_line(client(server, "health", "--model", "cats"), "cats is not ready")


def test_models(server):
    result = client(server, "models")
    assert result.returncode == 0
    for word in ("digits", "32 x 32", "onnx", "cpu"):
        assert word in result.stdout


def test_models_as_json(server):
    result = client(server, "models", "--json")
    assert result.returncode == 0
    (model,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert (model["name"], model["version"], model["ready"]) == ("digits", 1, True)
    assert model["labels"] == [str(label) for label in range(10)]


def test_version():
    result = run_module("convoy.client", "--version")
    assert result.returncode == 0
    assert result.stdout == f"convoy-client {convoy.client.__version__}\n"
    assert convoy.client.__version__ == version("convoy-serving")
