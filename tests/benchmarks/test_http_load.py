"""The load over HTTP against a real server, in both kinds of loop."""

import json

import pytest

from tests.processes import run_module, running_server
from tests.server.conftest import HEIGHT, WIDTH, publish_version


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    repository = tmp_path_factory.mktemp("models")
    publish_version(repository / "colors" / "1")
    with running_server(repository, "--device", "cpu") as server:
        yield f"{server.url}/v2/models/colors/infer"


@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--rate", "50"]], ids=["closed", "open"])
def test_every_request_is_counted_once(url, load):
    flags = ["--input", "image", "--tensor", f"UINT8:1,{HEIGHT},{WIDTH},3", "--seconds", "0.5"]
    done = run_module("benchmarks.http_load", url, *flags, "--warmup-s", "0.1", *load)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert run["completed"] > 0
    assert run["completed"] + sum(run["errors"].values()) == run["offered"]


def test_rejections_do_not_count_as_answers(url):
    wrong = ["--tensor", "UINT8:1,4,4,3", "--rate", "50", "--seconds", "0.5", "--warmup-s", "0.1"]
    done = run_module("benchmarks.http_load", url, *wrong)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert run["completed"] == 0
    assert run["errors"] == {"UNKNOWN": run["offered"]}
