"""What the secured stack is made of, without an engine: secrets, health check, overlay."""

import os
import re
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml
from PIL import Image

from convoy.client import Client, ClientError, ConnectionOptions, Tls
from tests.needs import needs_program
from tests.processes import ServerProcess, running_server
from tests.server.conftest import publish_version

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAY = yaml.safe_load((ROOT / "docker-compose.secure.yml").read_text())

pytestmark = needs_program("openssl", "openssl")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secured") / "secrets"
    make_secrets(folder)
    return folder


def make_secrets(folder: Path, *names: str) -> None:
    command = [DEPLOY / "make-secrets", folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def environment(service: str, secrets: Path) -> dict[str, str]:
    """The variables that the overlay gives to a service, with files in place of its secrets."""
    files = {
        name: secrets / Path(secret["file"]).name for name, secret in OVERLAY["secrets"].items()
    }
    given = OVERLAY["services"][service]["environment"]
    return {
        key: re.sub(r"/run/secrets/(\w+)", lambda match: str(files[match[1]]), value)
        for key, value in given.items()
    }


@pytest.fixture(scope="module")
def secured(secrets, tmp_path_factory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models") / "models"
    publish_version(models / "colors" / "1")
    variables = environment("server", secrets)
    flags = [
        text
        for key, value in variables.items()
        for text in ("--" + key.removeprefix("CONVOY_").lower().replace("_", "-"), value)
    ]
    with running_server(models, "--device", "cpu", *flags) as server:
        yield server


def test_only_the_owner_enters_the_folder_of_secrets(secrets):
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert stat.S_IMODE((secrets / "ca.key").stat().st_mode) == 0o400
    (name, token) = (secrets / "tokens").read_text().split()
    assert (name, token) == ("batch", (secrets / "token").read_text().strip())
    assert len(token) == 64
    assert (secrets / "grafana-password").read_text().strip() not in ("", "admin")
    assert set(environment("grafana", secrets).values()) >= {str(secrets / "grafana-password")}


def test_files_that_exist_are_kept_and_names_are_in_the_certificate(secrets, tmp_path):
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    make_secrets(secrets)
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before
    make_secrets(tmp_path / "named", "convoy.example", "192.0.2.7")
    command = ["openssl", "x509", "-in", tmp_path / "named" / "server.crt", "-noout", "-text"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("DNS:server", "DNS:localhost", "DNS:convoy.example", "IP Address:192.0.2.7"):
        assert name in shown


def test_callers_need_the_token_and_trust_the_authority(secured, secrets):
    image = Image.new("RGB", (6, 4), "red")
    tls, token = Tls(ca=secrets / "ca.crt"), (secrets / "token").read_text().strip()
    with Client(secured.address, options=ConnectionOptions(tls=tls, token=token)) as client:
        assert client.classify(image).best.label == "red"
    with (
        Client(secured.address, options=ConnectionOptions(tls=tls)) as client,
        pytest.raises(ClientError),
    ):
        client.classify(image)
    context = ssl.create_default_context(cafile=secrets / "ca.crt")
    with urllib.request.urlopen(secured.url, context=context, timeout=30) as page:
        assert b"<title>Convoy</title>" in page.read()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{secured.url}/v2", context=context, timeout=30)


def test_the_overlay_reads_the_token_of_batch_jobs(secured, secrets, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "images" / "red.png")
    entry = [each.replace("$$", "$") for each in OVERLAY["services"]["batch"]["entrypoint"]]
    entry = [each.replace("/run/secrets/token", str(secrets / "token")) for each in entry]
    variables = {**environment("batch", secrets), "CONVOY_ADDRESS": secured.address}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*entry, "batch", tmp_path / "images", "--out", tmp_path / "out.csv"],
        env={**os.environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "red.png,red" in (tmp_path / "out.csv").read_text()


def healthy():
    loader = SourceFileLoader("healthy", str(DEPLOY / "healthy"))
    module = module_from_spec(spec_from_loader("healthy", loader))
    loader.exec_module(module)
    return module


def ports_of(server: ServerProcess) -> dict[str, str]:
    return {
        "CONVOY_PORT": server.address.rpartition(":")[2],
        "CONVOY_METRICS_PORT": server.metrics.rpartition(":")[2],
        "CONVOY_HOST": "0.0.0.0",
    }


def test_the_health_check_follows_ports_and_tls(secured, secrets):
    variables = {**ports_of(secured), **environment("server", secrets)}
    healthy().check([], variables)
    # Without a port of its own it looks where the server would listen.
    for name in ("CONVOY_PORT", "CONVOY_METRICS_PORT"):
        with pytest.raises(OSError, match="Connection"):
            healthy().check([], {**variables, name: "1"})


def test_the_health_check_reads_flags_then_variables_then_the_file(tmp_path):
    (tmp_path / "config.toml").write_text('port = 3\nhost = "h"\nmetrics_port = 4\n')
    variables = {"CONVOY_CONFIG": str(tmp_path / "config.toml"), "CONVOY_PORT": "2"}
    arguments = ["python", "convoy-server", "--port", "1"]

    def found(name: str, arguments: list[str]) -> str:
        return healthy().setting(name, "default", arguments, variables)

    assert found("port", arguments) == found("port", ["--port=1"]) == "1"
    assert found("port", []) == "2"
    assert found("metrics_port", []) == "4"
    assert found("tls_certificate", []) == "default"


def test_a_server_that_is_not_ready_is_not_healthy(tmp_path):
    (tmp_path / "models").mkdir()
    with (
        running_server(tmp_path / "models", "--device", "cpu") as server,
        pytest.raises(urllib.error.HTTPError, match="503"),
    ):
        healthy().check([], ports_of(server))


def test_the_health_check_needs_no_package_and_is_in_the_image():
    command = [sys.executable, "-I", "-S", DEPLOY / "healthy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("not healthy: ")
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "COPY deploy/healthy /usr/local/bin/healthy" in dockerfile
    assert 'CMD ["healthy"]' in dockerfile
    assert os.access(DEPLOY / "healthy", os.X_OK)
