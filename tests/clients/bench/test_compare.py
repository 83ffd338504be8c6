"""`convoy-client bench compare`: two measurements side by side."""

import json
from pathlib import Path

import numpy as np
import pytest

from convoy.client.bench import BenchError
from convoy.client.bench.compare import compare
from tests.processes import run_module

COMPARE = ("bench", "compare")


def written(path: Path, throughputs: list[float], load: str = "closed, 8") -> Path:
    runs = [
        {
            "load": load,
            "throughput_per_s": each,
            "latency_s": {"mean": 8 / each, "p50": 7 / each, "p99": None},
        }
        for each in throughputs
    ]
    path.write_text(json.dumps({"runs": runs}))
    return path


def test_a_difference_beyond_chance_is_shown(tmp_path):
    a = written(tmp_path / "a.json", [1000, 1010, 990, 1005, 995])
    b = written(tmp_path / "b.json", [1100, 1111, 1089, 1105, 1095])
    found = {each.metric: each for each in compare(a, b)}
    assert set(found) == {"throughput_per_s", "mean", "p50"}  # p99 had too few samples
    throughput = found["throughput_per_s"]
    assert throughput.ratio == pytest.approx(1.1, rel=1e-3)
    assert throughput.differs
    # Welch's interval of the logarithms, by hand: 8 degrees of freedom, t = 2.306.
    logs = [np.log([1000, 1010, 990, 1005, 995]), np.log([1100, 1111, 1089, 1105, 1095])]
    error = np.sqrt(sum(np.var(each, ddof=1) / 5 for each in logs))
    low = np.exp(logs[1].mean() - logs[0].mean() - 2.306 * error)
    assert throughput.low == pytest.approx(low, rel=1e-3)
    assert found["mean"].ratio == pytest.approx(1 / 1.1, rel=1e-3)


def test_the_confidence_interval_has_its_stated_coverage(tmp_path):
    random = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        a = written(tmp_path / "a.json", list(1000 * np.exp(random.normal(0, 0.05, 5))))
        b = written(tmp_path / "b.json", list(1000 * np.exp(random.normal(0, 0.02, 5))))
        held += not compare(a, b)[0].differs
    assert 0.92 < held / 400 < 0.98


def test_too_few_runs_or_other_files(tmp_path):
    a = written(tmp_path / "a.json", [1000, 1010])
    b = written(tmp_path / "b.json", [1000, 1010, 990])
    with pytest.raises(BenchError, match=r"expected a load with 3 runs .* got 2 of 'closed, 8'"):
        compare(a, b)
    with pytest.raises(BenchError, match="expected a load with 3 runs"):
        compare(b, written(tmp_path / "c.json", [1000, 1010, 990], "closed, 4"))
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(BenchError, match="expected the output of bench --json"):
        compare(b, tmp_path / "d.json")
    with pytest.raises(BenchError, match="No such file"):
        compare(b, tmp_path / "e.json")


def test_real_runs_by_the_command_line(server, repository, tmp_path):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        start, stop = samples["encoded_offsets"][:2]
        (tmp_path / "digit.png").write_bytes(samples["encoded"][start:stop].tobytes())
    command = ("bench", tmp_path / "digit.png", "--concurrency", "2,2,2", "--duration-s", "0.3")
    flags = ("--warmup-s", "0.1", "--processes", "1", "--json", "--address", server.address)
    flags += ("--metrics", f"{server.metrics}/metrics")
    result = run_module("convoy.client", *command, *flags)
    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    # The decoding of an image is a stage, and the stages add up.
    for run in runs:
        stages = dict(run["stages_s"])
        assert stages["decode_s"] > 0
        del stages["batch_size"]
        assert sum(stages.values()) == pytest.approx(run["latency_s"]["mean"], rel=0.01)
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(result.stdout)
    compared = run_module("convoy.client", *COMPARE, tmp_path / "a.json", tmp_path / "b.json")
    assert compared.returncode == 0, compared.stderr
    head, *rows = compared.stdout.splitlines()
    assert head.split() == ["load", "metric", "A", "B", "B/A", "95", "%", "runs", "differs"]
    assert rows[0].startswith(" closed, 2  answered/s")
    assert all(row.endswith("3/3   not shown ") for row in rows)
    named = run_module("convoy.client", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert named.returncode == 2  # one name only
    usage = run_module("convoy.client", *COMPARE, tmp_path / "a.json")
    assert usage.returncode == 2
    assert usage.stderr == "convoy-client: Missing argument 'B'.\n"
