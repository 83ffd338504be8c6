"""Programs that nobody here wrote: NVIDIA's client, Prometheus, promtool."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

from tests.needs import needs_program
from tests.processes import ServerProcess


def test_tritonclient_finds_the_model_and_gets_the_nets_logits(server, repository):
    program = Path(__file__).with_name("triton_check.py")
    samples = repository / "digits" / "1" / "samples.npz"
    result = subprocess.run(
        [sys.executable, program, server.address, "digits", samples],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    with np.load(samples, allow_pickle=False) as golden:
        np.testing.assert_allclose(seen["logits"], golden["logits"], atol=1e-4)
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, True)
    assert seen["unknown_ready"] is False
    assert (seen["server"], seen["id"]) == ("convoy", "42")
    assert seen["metadata"]["platform"] == "onnx_onnxv1"
    assert seen["error"] == "StatusCode.NOT_FOUND"


def test_tritonclient_streams_and_uses_the_extensions(server, repository):
    program = Path(__file__).with_name("triton_extensions_check.py")
    samples = repository / "digits" / "1" / "samples.npz"
    result = subprocess.run(
        [sys.executable, program, server.address, "digits", samples],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    with np.load(samples, allow_pickle=False) as golden:
        logits = golden["logits"]
    for way in ("stream", "aio", "aio_stream", "files"):
        np.testing.assert_allclose(seen[way], logits, atol=1e-4, err_msg=way)
    (error,) = seen["stream_errors"]
    assert "got 'unknown'" in error
    for (first, second), row in zip(seen["classes"], logits, strict=True):
        best = row.argsort()[::-1]
        assert [text.split(":")[1:] for text in (first, second)] == [
            [str(index), str(index)] for index in best[:2]
        ]
        assert re.fullmatch(r"[01]\.[0-9]{6}:[0-9]:[0-9]", first)
    assert seen["config"]["platform"] == "onnxruntime_onnx"
    assert seen["config"]["input"][0]["data_type"] == "TYPE_UINT8"
    assert int(seen["statistics"]["inference_stats"]["success"]["count"]) > len(logits)
    assert seen["late"] == "StatusCode.DEADLINE_EXCEEDED"


@needs_program("promtool", "prometheus")
def test_promtool_finds_nothing_wrong_with_the_metrics(server: ServerProcess):
    with urllib.request.urlopen(f"{server.metrics}/metrics") as reply:
        exposition = reply.read()
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _ask(port: int, query: str) -> list[dict[str, object]]:
    url = f"http://127.0.0.1:{port}/api/v1/query?query={query}"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.load(reply)["data"]["result"]
    except OSError:
        return []


@needs_program("prometheus", "prometheus")
def test_prometheus_scrapes_the_server(server: ServerProcess, tmp_path: Path):
    port = _free_port()
    target = server.metrics.removeprefix("http://")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: convoy, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as prometheus:
        try:
            deadline_s = time.monotonic() + 60
            found: list[dict[str, object]] = []
            while not found and time.monotonic() < deadline_s:
                time.sleep(0.2)
                found = _ask(port, "convoy_model_info")
            up = _ask(port, "up")
        finally:
            prometheus.terminate()
    (series,) = found
    assert series["metric"]["model"] == "digits"
    assert series["metric"]["provider"] == "CPUExecutionProvider"
    assert [result["value"][1] for result in up] == ["1"]
