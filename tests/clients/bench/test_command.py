"""`convoy-client bench` as a process, against a real server process."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from convoy.client import ClientError
from convoy.client.bench.latencies import Latencies
from convoy.client.cli import app
from tests.processes import run_module

SHORT = ("--duration-s", "0.5", "--warmup-s", "0.1", "--processes", "1")


@pytest.fixture(scope="module")
def image(repository, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "digit.png"
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        Image.fromarray(samples["images"][0]).save(path)
    return path


def bench(server, *arguments):
    return run_module("convoy.client", "bench", *arguments, *SHORT, "--address", server.address)


def measured(server, *arguments):
    result = bench(server, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_closed_loops_with_the_servers_own_split(server, image):
    metrics = f"{server.metrics}/metrics"
    report = measured(
        server, image, "--concurrency", "1,4", "--metrics", metrics, "--slo-ms", "9999"
    )
    assert report["method"] == "/convoy.v1.ClassifierService/Classify"
    assert [run["concurrency"] for run in report["runs"]] == [1, 4]
    for run in report["runs"]:
        assert run["errors"] == {}
        assert run["completed"] == run["offered"] > 4
        assert run["goodput_per_s"] == run["offered_per_s"]
        latency_s = run["latency_s"]
        assert 0 < latency_s["p50"] <= latency_s["max"]
        p50_s = Latencies.decode(run["histogram"].encode()).percentile_s(50)
        assert p50_s == latency_s["p50"]
        stages_s = run["stages_s"]
        assert stages_s.pop("batch_size") >= 1
        assert sum(stages_s.values()) == pytest.approx(latency_s["mean"], rel=0.01)
        assert all(stages_s[stage] > 0 for stage in ("network_s", "queue_s", "inference_s"))


@pytest.mark.parametrize("form", ["encoded", "raw"])
def test_both_forms_of_images(server, image, form):
    (run,) = measured(server, image, "--payload", form, "--rate", "40")["runs"]
    assert (run["loop"], run["rate_per_s"], run["errors"]) == ("open", 40, {})


def test_tensors_by_the_servers_description_and_by_argument(server):
    flags = ("--protocol", "oip", "--model", "digits", "--payload", "raw", "--images", "3")
    report = measured(server, *flags)
    assert report["method"] == "/inference.GRPCInferenceService/ModelInfer"
    assert report["images_per_request"] == 3
    assert report["request_bytes"] > 3 * 32 * 32 * 3
    said = measured(server, *flags, "--input", "image:UINT8:-1,32,32,3")
    for run in (*report["runs"], *said["runs"]):
        assert run["errors"] == {}
        assert run["completed"] > 0


def test_image_files_by_the_open_inference_protocol(server, image):
    """The server describes its input of pixels only; the caller names the one for image files."""
    flags = ("--protocol", "oip", "--model", "digits", "--concurrency", "2")
    files = ("--input", "image:BYTES:-1", "--images", "3")
    before = server.metric("convoy_outcomes_total", reason="ok")
    report = measured(server, image, *flags, *files)
    assert report["method"] == "/inference.GRPCInferenceService/ModelInfer"
    assert report["images_per_request"] == 3
    assert report["request_bytes"] > 3 * image.stat().st_size
    (run,) = report["runs"]
    assert run["errors"] == {}
    answered = server.metric("convoy_outcomes_total", reason="ok") - before
    assert answered >= run["completed"] > 0
    rejected = bench(server, image, *flags)
    assert rejected.returncode == 1
    assert "one BYTES input for encoded images, got image UINT8; give --input" in rejected.stderr


def test_a_sweep_a_trace_a_table_and_a_plot(server, image, tmp_path):
    plot = tmp_path / "bench.png"
    flags = ("--rate", "20", "--arrivals", "constant", "--slo-ms", "1000", "--plot", plot)
    result = bench(server, image, *flags)
    assert result.returncode == 0, result.stderr
    for word in ("constant, 20/s", "in SLO", "p99.9"):
        assert word in result.stdout
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG"
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 2
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(str(n / 100) for n in range(60)))
    (run,) = measured(server, image, "--trace", trace)["runs"]
    assert (run["offered"], run["errors"]) == (50, {})


def test_a_sweep_finds_a_rate(server, image):
    report = measured(server, image, "--sweep", "--slo-ms", "500", "--rate", "200")
    assert report["highest_rate_per_s"] > 10
    assert len(report["runs"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sweep",), "--sweep: expected --slo-ms"),
        (("--sweep", "--slo-ms", "5", "--rate", "1,2"), "one --rate"),
        (("--rate", "fast"), "--rate: expected N"),
        (("--rate", "0"), "rate: expected above 0"),
        (("--concurrency", "0"), "concurrency: expected at least 1"),
        (("--trace", "no.csv"), "no.csv"),
        (("--plot", "no/where.png"), "no such folder"),
        (("--plot", "where.xyz"), "where.xyz"),
        (("--metrics", "http://127.0.0.1:1/metrics"), "--metrics"),
        (("--images", "2"), "--protocol oip"),
        (("--protocol", "oip"), "--model"),
        (("--protocol", "oip", "--model", "cats"), "cats"),
        (("--payload", "raw", "--model", "cats"), "expected one of digits"),
    ],
)
def test_invalid_options_fail_before_the_run(server, image, arguments, words):
    command = ("bench", image, *arguments, *SHORT, "--address", server.address)
    with pytest.raises(ClientError, match=re.escape(words)):
        app([str(part) for part in command], standalone_mode=False)


def test_a_usage_error_is_one_line(server, image):
    result = bench(server, image, "--model", "cats")
    assert result.returncode == 1
    assert result.stderr == "convoy-client: model: expected one of digits, got 'cats'\n"
