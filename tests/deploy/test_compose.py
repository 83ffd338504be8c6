"""The compose stack on volumes, plain and secured, really built and run.

`make compose-test`; other runs leave it out. Grafana is not started: the rest of the stack does not
need it, and its dashboard's queries have a test of their own.
"""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime

import pyarrow.parquet
import pytest
from playwright.sync_api import expect, sync_playwright

from convoy.client import Client, ClientError, ConnectionOptions, Tls
from tests.deploy.compose import BATCH_UID, BUILD_TIMEOUT_S, Stack, docker, eventually, stack_of
from tests.e2e.test_page import CHROMIUM, opened
from tests.needs import needs_program

PROJECT = "convoy-compose-test"
UID = "10001"
BATCH = ("--profile", "batch", "run", "--rm", "-T", "batch")

pytestmark = [pytest.mark.compose, pytest.mark.timeout(BUILD_TIMEOUT_S)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """Builds and starts trainer, server and Prometheus."""
    with stack_of(PROJECT, tmp_path_factory.mktemp("stack"), "docker-compose.yml") as stack:
        stack.run("up", "-d", "--build", "server", "prometheus", timeout_s=BUILD_TIMEOUT_S)
        yield stack


def test_the_server_is_healthy_once_its_model_is_ready(stack):
    stack.wait_until_healthy()
    assert stack.inspect("trainer")["State"]["ExitCode"] == 0


def test_images_are_classified_through_the_published_port(stack):
    right = [label == str(digit) for digit, label in enumerate(stack.classify())]
    assert sum(right) >= 8


def test_the_trainer_has_trained_on_a_fresh_volume(stack):
    log = stack.text("logs", "--no-color", "trainer")
    assert "nothing to do" not in log
    found = stack.once("find /models/digits/1 /runs/digits -maxdepth 1 -type f").decode().split()
    assert {"/models/digits/1/manifest.json", "/runs/digits/best.pt"} <= set(found)


@pytest.fixture
def torch_server(stack) -> Iterator[str]:
    """Builds `server-torch` and serves the stack's models by it; yields the container."""
    tag = "convoy-server-torch:local"
    runtime = f"RUNTIME={os.environ.get('CONVOY_RUNTIME', 'server')}"
    build = ("--target", "server-torch", "--tag", tag, "--build-arg", runtime, ".")
    docker("build", "--quiet", *build, timeout_s=BUILD_TIMEOUT_S)
    yield from run_server(tag, "8001", "--backend", "torchscript", "--device", "cpu")


@pytest.fixture
def server_on_other_ports(stack) -> Iterator[str]:
    """Serves the stack's models by its image on other ports of the container."""
    yield from run_server("convoy-server:local", "9001", "--port", "9001", "--metrics-port=9002")


def run_server(tag: str, port: str, *flags: str) -> Iterator[str]:
    """Runs a server on the stack's models and publishes a port; yields the container."""
    limits = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--memory", "2g")
    models = ("--volume", f"{PROJECT}_models:/models:ro", "--publish", f"127.0.0.1::{port}")
    container = docker("run", "--detach", *limits, *models, tag, *flags)
    try:
        yield container
    finally:
        print(docker("logs", "--tail", "20", container))
        docker("rm", "--force", container)


def wait_for_health(container: str) -> None:
    def is_healthy() -> bool:
        (state,) = json.loads(docker("inspect", container))
        return state["State"]["Health"]["Status"] == "healthy"

    eventually(is_healthy, 120, "the container is healthy")


def test_the_server_with_torch_serves_torchscript(stack, torch_server):
    wait_for_health(torch_server)
    with Client(docker("port", torch_server, "8001")) as client:
        assert [(model.backend, model.version) for model in client.models()] == [("torchscript", 1)]
        labels = [client.classify(path).best.label for path in stack.images]
    assert labels == stack.classify()


def test_the_health_check_of_the_image_follows_the_ports(server_on_other_ports):
    wait_for_health(server_on_other_ports)
    with Client(docker("port", server_on_other_ports, "9001")) as client:
        assert [model.version for model in client.models()] == [1]


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
    assert stack.text("exec", "-T", "server", "sh", "-c", script).split() == [UID, "tmp"]
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


def test_a_first_up_raises_no_alert(stack):
    """Prometheus runs while the trainer trains, and finds no server for so long."""
    stack.wait_until_healthy()
    assert stack.query('min_over_time(up{job="convoy"}[1h]) == 0')
    assert stack.query("last_over_time(ALERTS[1h])") == []


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
    assert b"nothing to do" in stack.once("train-once")


def test_the_batch_profile_writes_a_row_for_each_image(stack):
    stack.run(*BATCH, timeout_s=BUILD_TIMEOUT_S)
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


def test_a_server_that_was_up_and_is_gone_raises_an_alert(stack):
    stack.run("stop", "server")
    gone = 'ALERTS{alertname="ConvoyDown"}'
    eventually(lambda: stack.query(gone), 60, "the alert is pending or firing")


def test_logs_are_rotated(stack):
    config = stack.inspect("server")["HostConfig"]["LogConfig"]
    assert config == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}


def revision(stack: Stack) -> str:
    """The revision that the server's image was built of."""
    return stack.inspect("server")["Config"]["Labels"]["org.opencontainers.image.revision"]


def test_images_are_upgraded_and_rolled_back_by_their_tag(stack):
    stack.start("server")
    old, labels = revision(stack), stack.classify()
    upgraded = stack.with_variables(CONVOY_TAG="next", CONVOY_REVISION="next")
    upgraded.run("up", "-d", "--build", "server", timeout_s=BUILD_TIMEOUT_S)
    upgraded.wait_until_healthy()
    assert revision(stack) == "next"
    assert stack.classify() == labels
    stack.start("server")
    assert revision(stack) == old != "next"
    assert stack.classify() == labels
    docker("image", "rm", "--force", "convoy-trainer:next", "convoy-server:next")


def test_a_model_is_rolled_back(stack):
    stack.start("server")
    stack.once("convoy-export /runs/digits/best.pt --repository /models --name digits")
    stack.wait_for_version(2)
    stack.once("convoy-export promote digits 1 --repository /models")
    stack.wait_for_version(1)


def test_saved_volumes_are_restored(stack):
    stack.start("server")
    labels, versions = stack.classify(), stack.served_versions()
    saved = {name: stack.once(f"tar -C /{name} -c .") for name in ("models", "runs")}
    stack.down()
    assert docker("volume", "ls", "--quiet", "--filter", f"name={PROJECT}_") == ""
    for name, archive in saved.items():
        stack.once(f"tar -C /{name} -x", given=archive)
    stack.start("server")
    assert "nothing to do" in stack.text("logs", "--no-color", "trainer")
    assert (stack.classify(), stack.served_versions()) == (labels, versions)
    assert b"best.pt" in stack.once("ls /runs/digits")


@pytest.fixture(scope="module")
def secured(stack) -> Stack:
    """The same stack with docker-compose.secure.yml above it."""
    secured = stack.secured()
    secured.start("server", "prometheus")
    return secured


def test_callers_of_the_secured_stack_need_its_token(secured):
    labels = secured.classify()
    assert sum(label == str(digit) for digit, label in enumerate(labels)) >= 8
    address, tls = secured.address("server", 8001), Tls(ca=secured.secrets / "ca.crt")
    with (
        Client(address, options=ConnectionOptions(tls=tls)) as client,
        pytest.raises(ClientError),
    ):
        client.classify(secured.images[0])
    context = ssl.create_default_context(cafile=secured.secrets / "ca.crt")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"https://{address}/ui/state", context=context)


def test_the_page_of_the_secured_stack_opens(secured):
    context = ssl.create_default_context(cafile=secured.secrets / "ca.crt")
    url = f"https://{secured.address('server', 8001)}"
    with urllib.request.urlopen(url, context=context) as page:
        assert b"<title>Convoy</title>" in page.read()


@needs_program("chromium", "chromium")
def test_the_page_of_the_secured_stack_classifies_with_its_token(secured):
    url = f"https://{secured.address('server', 8001)}"
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
        # The browser does not know the stack's own authority; the client above does.
        opened(browser, url, ignore_https_errors=True) as page,
    ):
        field = page.get_by_label("Access token")
        expect(page.locator("#health")).to_have_text("a valid access token is needed")
        field.fill(secured.token)
        field.press("Enter")
        expect(page.locator("#health")).to_have_text("ready")
        page.locator("input[type=file]").set_input_files(secured.images[0])
        expect(page.locator("#best")).to_have_text(secured.classify()[0])


def test_the_secured_server_is_scraped_and_keeps_its_secrets(secured):
    started = datetime.fromisoformat(secured.inspect("server")["State"]["StartedAt"])

    def is_scraped() -> bool:
        """Of the server's own start, not of the plain server before it."""
        targets = secured.prometheus("targets")["activeTargets"]
        (target,) = (target for target in targets if target["labels"]["job"] == "convoy")
        return target["health"] == "up" and datetime.fromisoformat(target["lastScrape"]) > started

    eventually(is_scraped, 60, "the server is scraped")
    assert secured.token not in json.dumps(secured.inspect("server"))


def test_the_batch_profile_of_the_secured_stack_writes_its_rows(secured):
    table = "predictions/secured.parquet"
    secured.run(*BATCH, "batch", "/images", "--out", f"/{table}", timeout_s=300)
    rows = pyarrow.parquet.read_table(secured.folder / table).to_pylist()
    assert {row["path"] for row in rows} == {path.name for path in secured.images}
    assert not any(row["error"] for row in rows)
