"""Every query against a real Prometheus that scrapes a real server under load."""

import itertools
import json
import math
import re
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from convoy.client import Classification, Client, ClientError
from tests.deploy.expressions import (
    PROMETHEUS,
    ROOT,
    Expression,
    alert_expressions,
    autoscaler_expressions,
    dashboard,
    panel_expressions,
    record_expressions,
)
from tests.needs import needs_program
from tests.processes import ServerProcess, running_server
from tests.server.conftest import HEIGHT, WIDTH, publish_version
from tests.server.models.test_canary import swap_red_and_blue

MODEL = "colors"
ANSWERS_WITHIN_S = 60
# All requests try a canary, and how fast it is does not matter here.
# Nobody takes the spans; their ids are in the exemplars.
TRACES = ("--otlp-endpoint", "http://127.0.0.1:1/v1/traces")
CANARY = ("--canary-share", 1, "--canary-requests", 30, "--canary-max-slowdown", 1e6)
# Only a machine with a GPU has these; test_prometheus feeds their queries by hand.
NVML_METRICS = frozenset({"convoy_device_memory_bytes", "convoy_device_utilization_ratio"})
QUERIES = [*record_expressions(), *panel_expressions(), *autoscaler_expressions()]
Samples = list[tuple[dict[str, str], float]]

pytestmark = needs_program("prometheus", "prometheus")


@dataclass
class Load:
    """Requests until `stop` is set, and how they ended."""

    stop: threading.Event = field(default_factory=threading.Event)
    answers: Counter[str] = field(default_factory=Counter)

    def images(self) -> Iterator[object]:
        """One-colored pictures, and now and then bytes that are not a picture."""
        pictures = [
            Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "lime", "blue")
        ] * 10
        for image in itertools.cycle([*pictures, b"this is no picture"]):
            if self.stop.is_set():
                return
            yield image

    def run(self, address: str) -> None:
        """Sends requests with a deadline, some of them in flight at a time."""
        with Client(address, timeout_s=20) as client:
            for answer in client.classify_many(self.images(), in_flight=8):
                ended = answer.best.label if isinstance(answer, Classification) else "invalid"
                self.answers[ended] += 1


@dataclass
class Observed:
    """A server under load and the Prometheus that watches it."""

    server: ServerProcess
    load: Load
    prometheus: str

    def ask(self, promql: str) -> Samples:
        """The finite values of an expression now."""
        answer = self._call("query", query=promql)
        samples = answer["result"]
        if answer["resultType"] == "scalar":
            samples = [{"metric": {}, "value": samples}]
        values = [(sample["metric"], float(sample["value"][1])) for sample in samples]
        return [(labels, value) for labels, value in values if math.isfinite(value)]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {labels["alertname"] for labels, _ in self.ask('ALERTS{alertstate="firing"}')}

    def metric_names(self) -> set[str]:
        """Names of all series, without a histogram's suffixes."""
        names = self._call("label/__name__/values")
        return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}

    def exemplars(self, promql: str) -> list[dict[str, str]]:
        """The labels of the exemplars of a query's series in the last minute."""
        now_s = time.time()
        found = self._call("query_exemplars", query=promql, start=now_s - 60, end=now_s)
        return [each["labels"] for series in found for each in series["exemplars"]]

    def _call(self, path: str, **parameters: object) -> Any:
        url = f"http://{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]


def compose_flags(name: str) -> list[str]:
    """The flags of a name that the stack gives to Prometheus."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return [flag for flag in services["prometheus"]["command"] if flag.startswith(f"{name}=")]


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[str]:
    """Starts a Prometheus with the stack's rules that scrapes each second; yields its address."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    config["scrape_configs"] = [
        {"job_name": "convoy", "static_configs": [{"targets": [target]}]},
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"]
    command += compose_flags("--enable-feature")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address, log = "", []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r'"?Listening on"? address=(\S+)', line):
                address = found[1]
                break
        # Its pipe must not fill.
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        try:
            assert address, log
            yield address
        finally:
            process.terminate()
            drain.join()


def stage_version(folder: Path, models: Path, spoil: Callable[[Path], object] | None) -> None:
    """Publishes a version by one rename, spoilt before it."""
    publish_version(folder)
    if spoil:
        spoil(folder)
    folder.rename(models / folder.parent.name / folder.name)


def cut_short(folder: Path) -> None:
    """Leaves a file of another digest than the manifest says."""
    (folder / "model.onnx").write_bytes(b"cut short")


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    models = folder / "models"
    staged = folder / "staged" / MODEL
    publish_version(models / MODEL / "1")
    load = Load()
    with (
        running_server(models, "--device", "cpu", "--poll-s", 0.2, *CANARY, *TRACES) as server,
        running_prometheus(folder, server.metrics.removeprefix("http://")) as prometheus,
    ):
        # Before the load, for what is counted of a version is forgotten with it.
        stage_version(staged / "2", models, None)
        try_canary(server, load)
        ask_for_no_model(server, load)
        # For a moment the storage has an error.
        (models / "broken").symlink_to("x" * 300)
        server.wait_for("repository error")
        (models / "broken").unlink()
        stage_version(staged / "3", models, cut_short)
        server.wait_for("version rejected")
        stage_version(staged / "4", models, swap_red_and_blue)
        sender = threading.Thread(target=load.run, args=(server.address,))
        sender.start()
        try:
            server.wait_for("version rolled back")
            yield Observed(server, load, prometheus)
        finally:
            load.stop.set()
            sender.join()


def try_canary(server: ServerProcess, load: Load) -> None:
    """Sends what a verdict needs, until the canary answers."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "red")
    with Client(server.address, timeout_s=20) as client:
        while (answer := client.classify(picture)).version == 1:
            pass
    load.answers[answer.best.label] += 1


def ask_for_no_model(server: ServerProcess, load: Load) -> None:
    """Sends a request for a model that is not in service."""
    with Client(server.address) as client, pytest.raises(ClientError):
        client.classify(Image.new("RGB", (WIDTH, HEIGHT)), model="cats")
    load.answers["invalid"] += 1


@pytest.fixture(scope="module")
def answers(observed) -> dict[str, Samples]:
    """What each query gave as soon as it gave anything, under load."""
    pending = {query.promql for query in QUERIES if not query.metrics & NVML_METRICS}
    given: dict[str, Samples] = {}
    deadline_s = time.monotonic() + ANSWERS_WITHIN_S
    while pending and time.monotonic() < deadline_s:
        given |= {promql: samples for promql in pending if (samples := observed.ask(promql))}
        pending -= given.keys()
        time.sleep(0.5)
    return given


def test_the_server_has_the_metrics_that_are_asked_for(observed, answers):
    needed = frozenset().union(*(query.metrics for query in (*QUERIES, *alert_expressions())))
    missing = needed - observed.metric_names()
    assert missing <= NVML_METRICS


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_no_query_is_empty_or_impossible(answers, query: Expression):
    if missing := query.metrics & NVML_METRICS:
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    samples = answers.get(query.promql)
    assert samples, f"no value within {ANSWERS_WITHIN_S} s: {query.promql}"
    signed = query.metrics & {
        "convoy_deadline_slack_seconds",
        "convoy_predicted_minus_actual_batch_seconds",
    }
    for labels, value in samples:
        assert value >= 0 or signed, (labels, value)
        assert query.unit != "percentunit" or value <= 1.001, (labels, value)
        assert query.unit != "s" or value < 60, (labels, value)


def test_latency_quantiles_are_in_order(observed, answers):
    p50, p90, p99 = (
        observed.ask(f"model:convoy_request_duration_seconds:{p}_rate5m")[0][1]
        for p in ("p50", "p90", "p99")
    )
    assert 0 < p50 <= p90 <= p99


def test_panels_of_latency_link_to_traces(observed, answers):
    panels = [
        panel
        for panel in dashboard()["panels"]
        if any(target.get("exemplar") for target in panel.get("targets", ()))
    ]
    assert len(panels) == 3
    for query in panel_expressions():
        if query.place.rpartition(" ")[0] in {panel["title"] for panel in panels}:
            trace_ids = [labels["trace_id"] for labels in observed.exemplars(query.promql)]
            assert trace_ids
            assert all(re.fullmatch("[0-9a-f]{32}", each) for each in trace_ids)


def test_shares_of_all_classes_add_up(observed, answers):
    (query,) = (query for query in QUERIES if query.place == "Predicted classes A")
    assert sum(value for _, value in observed.ask(query.promql)) == pytest.approx(1)


def test_prometheus_counts_what_the_clients_saw(observed, answers):
    observed.load.stop.set()
    expected = {"ok": 0, "invalid": 0}
    deadline_s = time.monotonic() + ANSWERS_WITHIN_S
    counted: dict[str, float] = {}
    while counted != expected and time.monotonic() < deadline_s:
        time.sleep(0.5)
        seen = dict(observed.load.answers)
        expected = {
            "invalid": seen.pop("invalid"),
            "ok": sum(seen.values()),
        }
        samples = observed.ask("sum by (reason) (convoy_outcomes_total)")
        counted = {labels["reason"]: value for labels, value in samples}
    assert counted == expected


def test_only_the_rejected_and_the_rolled_back_version_alarm(observed, answers):
    expected = {"ConvoyRolledBack", "ConvoyVersionRejected"}
    deadline_s = time.monotonic() + ANSWERS_WITHIN_S
    while (firing := observed.firing()) < expected and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert firing == expected


def test_the_dashboard_offers_the_models_in_service(observed, answers):
    (variable,) = (v for v in dashboard()["templating"]["list"] if v["name"] == "model")
    assert variable["definition"] == "label_values(convoy_model_info, model)"
    labels = [labels["model"] for labels, _ in observed.ask("convoy_model_info")]
    assert labels == [MODEL]
