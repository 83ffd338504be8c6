"""The compose stack, plain and secured, really built and run.

`make compose-test`; other runs leave it out. Grafana is not started: the rest of the stack does not
need it, and its dashboard's queries have a test of their own.
"""

import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convoy.client import Client, ClientError, ConnectionOptions, Tls

ROOT = Path(__file__).parents[2]
PROJECT = "convoy-compose-test"
UID = "10001"
# The user of batch jobs, who is not root.
BATCH_UID = "4242"
OVERLAY = ("-f", "docker-compose.yml", "-f", "docker-compose.secure.yml")
BUILD_TIMEOUT_S = 3000

pytestmark = [pytest.mark.compose, pytest.mark.timeout(BUILD_TIMEOUT_S)]


def eventually(ask: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Asks until the answer is true; the stack's parts report no events to wait for."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.5)
    return answer


@dataclass(frozen=True)
class Stack:
    """The running stack, on ports that Docker chose."""

    compose: tuple[str, ...]
    environment: dict[str, str]
    folder: Path

    def run(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        """Runs a compose command and returns its stdout."""
        done = subprocess.run(
            [*self.compose, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def inspect(self, service: str) -> dict:
        """What the engine knows about a service's container, running or not."""
        container = self.run("ps", "-q", "-a", service).split()[0]
        return json.loads(docker("inspect", container))[0]

    def address(self, service: str, port: int) -> str:
        """Where a container's port is published."""
        return self.run("port", service, str(port)).strip()

    def is_healthy(self, service: str) -> bool:
        """Says what the image's health check found."""
        return self.inspect(service)["State"]["Health"]["Status"] == "healthy"

    def query(self, expression: str) -> list[dict]:
        """Asks Prometheus for the value of an expression."""
        return self.prometheus("query", query=expression)["result"]

    def prometheus(self, path: str, **parameters: str) -> dict:
        """Calls Prometheus's HTTP API."""
        url = f"http://{self.address('prometheus', 9090)}/api/v1/{path}"
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}") as reply:
            return json.load(reply)["data"]

    def classify(self) -> list[str]:
        """Classifies the ten images; returns their labels."""
        with Client(self.address("server", 8001)) as client:
            return [client.classify(path).best.label for path in self.images]

    @property
    def images(self) -> list[Path]:
        """Ten PNG files, of the digits 0 to 9."""
        return sorted((self.folder / "images").glob("*.png"))


def docker(*arguments: str, timeout_s: float = 60) -> str:
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


def compose_command() -> tuple[str, ...]:
    """Compose v2 where the plug-in is there, else v1; skips the tests without an engine."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no Docker engine answers")
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return "docker", "compose"
    if shutil.which("docker-compose") is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    return ("docker-compose",)


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """Builds and starts trainer, server and Prometheus; takes all down with its volumes."""
    compose = compose_command()
    folder = tmp_path_factory.mktemp("stack")
    (folder / "images").mkdir()
    for digit, pixels in enumerate(load_digits().images[:10]):
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(folder / f"images/{digit}.png")
    settings = {
        "COMPOSE_PROJECT_NAME": PROJECT,
        "CONVOY_PORT": "0",
        "CONVOY_METRICS_PORT": "0",
        "PROMETHEUS_PORT": "0",
        "TENSORBOARD_PORT": "0",
        "CONVOY_IMAGES": str(folder / "images"),
        # Docker makes this folder.
        "CONVOY_PREDICTIONS": str(folder / "predictions"),
        "CONVOY_SECRETS": str(folder / "secrets"),
        "CONVOY_UID": BATCH_UID,
        "CONVOY_GID": BATCH_UID,
    }
    stack = Stack(compose, {**os.environ, **settings}, folder)
    try:
        stack.run("up", "-d", "--build", "server", "prometheus", timeout_s=BUILD_TIMEOUT_S)
        yield stack
    finally:
        print(stack.run("logs", "--tail", "20", check=False))
        down = ("--profile", "tools", "--profile", "batch", "down", "--volumes", "--remove-orphans")
        stack.run(*down, timeout_s=180)


def test_the_server_is_healthy_once_its_model_is_ready(stack):
    eventually(lambda: stack.is_healthy("server"), 120, "the server is healthy")
    assert stack.inspect("trainer")["State"]["ExitCode"] == 0


def test_images_are_classified_through_the_published_port(stack):
    right = [label == str(digit) for digit, label in enumerate(stack.classify())]
    assert sum(right) >= 8


def test_the_trainer_has_trained_on_a_fresh_volume(stack):
    log = stack.run("logs", "--no-color", "trainer")
    assert "nothing to do" not in log
    files = "find /models/digits/1 /runs/digits -maxdepth 1 -type f"
    found = stack.run("run", "--rm", "-T", "trainer", "sh", "-c", files).split()
    assert {"/models/digits/1/manifest.json", "/runs/digits/best.pt"} <= set(found)


@pytest.fixture
def torch_server(stack) -> Iterator[str]:
    """Builds `server-torch` and serves the stack's models by it; yields the container."""
    tag = "convoy-server-torch:local"
    runtime = f"RUNTIME={os.environ.get('CONVOY_RUNTIME', 'server')}"
    build = ("--target", "server-torch", "--tag", tag, "--build-arg", runtime, ".")
    docker("build", "--quiet", *build, timeout_s=BUILD_TIMEOUT_S)
    limits = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--memory", "2g")
    models = ("--volume", f"{PROJECT}_models:/models:ro", "--publish", "127.0.0.1::8001")
    serve = ("--backend", "torchscript", "--device", "cpu")
    container = docker("run", "--detach", *limits, *models, tag, *serve)
    try:
        yield container
    finally:
        print(docker("logs", "--tail", "20", container))
        docker("rm", "--force", container)


def test_the_server_with_torch_serves_torchscript(stack, torch_server):
    def is_healthy() -> bool:
        (state,) = json.loads(docker("inspect", torch_server))
        return state["State"]["Health"]["Status"] == "healthy"

    eventually(is_healthy, 120, "the server with torch is healthy")
    with Client(docker("port", torch_server, "8001")) as client:
        assert [(model.backend, model.version) for model in client.models()] == [("torchscript", 1)]
        labels = [client.classify(path).best.label for path in stack.images]
    assert labels == stack.classify()


def test_ports_are_published_on_loopback_only(stack):
    for service in ("server", "prometheus"):
        bindings = stack.inspect(service)["HostConfig"]["PortBindings"].values()
        assert {binding["HostIp"] for ports in bindings for binding in ports} == {"127.0.0.1"}


def test_the_server_runs_without_root_rights_tools_or_torch(stack):
    script = (
        "id -u; for path in / /app /models; do touch $path/x 2>/dev/null && echo wrote $path; done;"
        "for tool in cc gcc make git pip uv; do command -v $tool; done;"
        "for module in pip torch; do python -c import\\ $module 2>/dev/null && echo $module; done;"
        "touch /tmp/x && echo tmp"
    )
    assert stack.run("exec", "-T", "server", "sh", "-c", script).split() == [UID, "tmp"]
    host = stack.inspect("server")["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["Memory"] == 2 * 2**30


def test_the_container_images_describe_themselves(stack):
    labels = stack.inspect("server")["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "convoy-server"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {"description", "version", "revision"} <= {key.rpartition(".")[2] for key in labels}


def test_prometheus_scrapes_the_server_and_knows_its_latency(stack):
    def latency() -> list[dict]:
        stack.classify()
        answer = stack.query("model:convoy_request_duration_seconds:p99_rate5m")
        return [sample for sample in answer if 0 < float(sample["value"][1]) < 10]

    (sample,) = eventually(latency, 120, "a latency quantile comes out")
    assert sample["metric"]["model"] == "digits"
    targets = stack.prometheus("targets")["activeTargets"]
    assert {target["labels"]["job"]: target["health"] for target in targets} == {
        "convoy": "up",
        "prometheus": "up",
    }
    groups = stack.prometheus("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    assert stack.prometheus("alerts")["alerts"] == []


def test_a_killed_server_comes_back(stack):
    labels = stack.classify()
    before = stack.inspect("server")
    # `docker kill` counts as a wish that it be down; a crash is a signal from outside Docker.
    image, pid = before["Image"], str(before["State"]["Pid"])
    kill = ("--rm", "--pid", "host", "--user", "0", "--entrypoint", "sh", image)
    docker("run", *kill, "-c", f"kill -9 {pid}")

    def is_back() -> bool:
        state = stack.inspect("server")
        return state["RestartCount"] > before["RestartCount"] and stack.is_healthy("server")

    eventually(is_back, 120, "the server is healthy again")
    assert stack.classify() == labels


def test_the_trainer_does_not_train_again(stack):
    assert "nothing to do" in stack.run("run", "--rm", "-T", "trainer")


def test_the_batch_profile_writes_a_row_for_each_image(stack):
    stack.run("--profile", "batch", "run", "--rm", "-T", "batch", timeout_s=BUILD_TIMEOUT_S)
    predictions = stack.folder / "predictions"
    assert str(predictions.stat().st_uid) == BATCH_UID
    table = pyarrow.parquet.read_table(predictions / "predictions.parquet")
    names = [path.name for path in stack.images]
    assert {row["path"]: row["label"] for row in table.to_pylist()} == dict(
        zip(names, stack.classify(), strict=True)
    )


def test_tensorboard_shows_the_run(stack):
    stack.run("--profile", "tools", "up", "-d", "--no-deps", "tensorboard")
    url = f"http://{stack.address('tensorboard', 6006)}/data/runs"

    def runs() -> list[str]:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)
        except OSError:
            return []

    assert "digits/tensorboard" in eventually(runs, 120, "TensorBoard lists the run")


def test_stopping_drains_and_exits_cleanly(stack):
    address = stack.address("server", 8001)
    stack.run("stop", "server")
    assert stack.inspect("server")["State"]["ExitCode"] == 0
    with Client(address, timeout_s=1) as client, pytest.raises(ClientError):
        client.classify(stack.images[0])


def test_logs_are_rotated(stack):
    config = stack.inspect("server")["HostConfig"]["LogConfig"]
    assert config == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}


def test_a_rolled_back_model_and_a_restored_volume_are_served(stack):
    """The commands of docs/deployment.md, on the volumes of this project."""
    stack.run("up", "-d", "--no-build", "server")
    eventually(lambda: stack.is_healthy("server"), 120, "the server is healthy")
    publish = "convoy-export /runs/digits/best.pt --repository /models --name digits"
    stack.run("run", "--rm", "-T", "trainer", *publish.split(), timeout_s=600)
    eventually(lambda: served_versions(stack) == [2], 120, "version 2 is served")
    rollback = "convoy-export promote digits 1 --repository /models"
    stack.run("run", "--rm", "-T", "trainer", *rollback.split())
    eventually(lambda: served_versions(stack) == [1], 120, "version 1 is served")
    save = "tar -C /models -c ."
    archive = subprocess.run(
        [*stack.compose, "run", "--rm", "-T", "--no-deps", "trainer", *save.split()],
        cwd=ROOT,
        env=stack.environment,
        capture_output=True,
        timeout=120,
        check=True,
    ).stdout
    stack.run("down", "--volumes", timeout_s=180)
    restore = "tar -C /models -x"
    subprocess.run(
        [*stack.compose, "run", "--rm", "-T", "--no-deps", "trainer", *restore.split()],
        cwd=ROOT,
        env=stack.environment,
        input=archive,
        capture_output=True,
        timeout=120,
        check=True,
    )
    stack.run("up", "-d", "--no-build", "server", timeout_s=300)
    eventually(lambda: stack.is_healthy("server"), 120, "the server is healthy")
    assert "nothing to do" in stack.run("logs", "--no-color", "trainer")
    assert served_versions(stack) == [1]


def served_versions(stack: Stack) -> list[int]:
    with Client(stack.address("server", 8001)) as client:
        return [model.version for model in client.models()]


@pytest.fixture(scope="module")
def secured(stack) -> Stack:
    """The same stack with docker-compose.secure.yml above it."""
    subprocess.run([ROOT / "deploy" / "make-secrets", stack.folder / "secrets"], check=True)
    secured = Stack((*stack.compose, *OVERLAY), stack.environment, stack.folder)
    secured.run("up", "-d", "--no-build", "server", "prometheus", timeout_s=300)
    eventually(lambda: secured.is_healthy("server"), 120, "the secured server is healthy")
    return secured


def test_callers_of_the_secured_stack_need_its_token(secured):
    folder = secured.folder / "secrets"
    tls, token = Tls(ca=folder / "ca.crt"), (folder / "token").read_text().strip()
    address = secured.address("server", 8001)
    with Client(address, options=ConnectionOptions(tls=tls, token=token)) as client:
        labels = [client.classify(path).best.label for path in secured.images]
    assert sum(label == str(digit) for digit, label in enumerate(labels)) >= 8
    with (
        Client(address, options=ConnectionOptions(tls=tls)) as client,
        pytest.raises(ClientError),
    ):
        client.classify(secured.images[0])
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    with urllib.request.urlopen(f"https://{address}", context=context) as page:
        assert b"<title>Convoy</title>" in page.read()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"https://{address}/ui/state", context=context)


def test_the_secured_server_is_scraped_and_keeps_its_secrets(secured):
    eventually(lambda: secured.query('up{job="convoy"} == 1'), 60, "the server is scraped")
    token = (secured.folder / "secrets" / "token").read_text().strip()
    assert token not in json.dumps(secured.inspect("server"))


def test_the_batch_profile_of_the_secured_stack_writes_its_rows(secured):
    (secured.folder / "predictions" / "predictions.parquet").unlink()
    arguments = ("--profile", "batch", "run", "--rm", "-T", "batch")
    secured.run(*arguments, timeout_s=300)
    table = pyarrow.parquet.read_table(secured.folder / "predictions" / "predictions.parquet")
    assert [bool(row["error"]) for row in table.to_pylist()] == [False] * 10
