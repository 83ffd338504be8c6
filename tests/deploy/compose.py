"""The compose stack as a test runs it: built, on ports that Docker chooses, and taken down."""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convoy.client import Client, ConnectionOptions, Tls

ROOT = Path(__file__).parents[2]
SECURE = "docker-compose.secure.yml"
# The user of batch jobs, who is not root.
BATCH_UID = "4242"
BUILD_TIMEOUT_S = 3000


def eventually(ask: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Asks until the answer is true; the stack's parts report no events to wait for."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.5)
    return answer


@dataclass(frozen=True)
class Stack:
    """A stack of these compose files, whose inputs and secrets are in a folder of the test."""

    compose: tuple[str, ...]
    files: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path

    def with_variables(self, **variables: str) -> "Stack":
        """The same stack with other variables."""
        return replace(self, environment={**self.environment, **variables})

    def secured(self) -> "Stack":
        """The same stack with docker-compose.secure.yml and new secrets."""
        subprocess.run([ROOT / "deploy" / "make-secrets", self.secrets], check=True)
        return replace(self, files=(*self.files, SECURE))

    def run(
        self, *arguments: str, timeout_s: float = 120, check: bool = True, given: bytes = b""
    ) -> bytes:
        """Runs a compose command and returns its stdout."""
        files = [word for name in self.files for word in ("-f", name)]
        done = subprocess.run(
            [*self.compose, *files, *arguments],
            cwd=ROOT,
            env=self.environment,
            input=given,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        said = done.stdout[-3000:] + done.stderr[-3000:]
        assert not check or done.returncode == 0, said.decode(errors="replace")
        return done.stdout

    def text(self, *arguments: str, timeout_s: float = 120) -> str:
        """Runs a compose command and returns its stdout as text."""
        return self.run(*arguments, timeout_s=timeout_s).decode()

    def once(self, command: str, given: bytes = b"") -> bytes:
        """Runs a command of the trainer's image in a container of its own; returns its stdout."""
        words = ("run", "--rm", "-T", "--no-deps", "trainer", *command.split())
        return self.run(*words, timeout_s=600, given=given)

    def start(self, *services: str) -> None:
        """Starts services, of images that exist, and waits until the server is healthy."""
        self.run("up", "-d", "--no-build", *services, timeout_s=300)
        self.wait_until_healthy()

    def down(self) -> None:
        """Removes the containers of all profiles and the volumes."""
        profiles = ("--profile", "tools", "--profile", "batch")
        self.run(*profiles, "down", "--volumes", "--remove-orphans", timeout_s=180)

    def wait_until_healthy(self) -> None:
        """Waits until the server's health check passes."""
        eventually(lambda: self.is_healthy("server"), 180, "the server is healthy")

    def inspect(self, service: str) -> dict:
        """What the engine knows about a service's container, running or not."""
        container = self.text("ps", "-q", "-a", service).split()[0]
        return json.loads(docker("inspect", container))[0]

    def address(self, service: str, port: int) -> str:
        """Where a container's port is published."""
        return self.text("port", service, str(port)).strip()

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

    def client(self) -> Client:
        """A client of the server, with the secrets of a secured stack."""
        options = ConnectionOptions()
        if SECURE in self.files:
            tls = Tls(ca=self.secrets / "ca.crt")
            options = ConnectionOptions(tls=tls, token=self.token)
        return Client(self.address("server", 8001), options=options)

    def classify(self) -> list[str]:
        """Classifies the ten images; returns their labels."""
        with self.client() as client:
            return [client.classify(path).best.label for path in self.images]

    def served_versions(self) -> list[int]:
        """The versions in service."""
        with self.client() as client:
            return [model.version for model in client.models()]

    def wait_for_version(self, version: int) -> None:
        """Waits until the server serves this version alone."""
        eventually(lambda: self.served_versions() == [version], 120, f"version {version} is served")

    @property
    def secrets(self) -> Path:
        """The folder of the stack's secrets."""
        return self.folder / "secrets"

    @property
    def token(self) -> str:
        """The token of batch jobs."""
        return (self.secrets / "token").read_text().strip()

    @property
    def images(self) -> list[Path]:
        """Ten PNG files, of the digits 0 to 9."""
        return sorted((self.folder / "images").glob("*.png"))


def docker(*arguments: str, timeout_s: float = 60) -> str:
    """Runs a docker command and returns its stdout."""
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


@contextmanager
def stack_of(
    project: str, folder: Path, *files: str, variables: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    """A stack with images and secrets, not started; takes all down with its volumes."""
    compose = compose_command()
    (folder / "images").mkdir()
    for digit, pixels in enumerate(load_digits().images[:10]):
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(folder / f"images/{digit}.png")
    settings = {
        "COMPOSE_PROJECT_NAME": project,
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
        **(variables or {}),
    }
    stack = Stack(compose, files, {**os.environ, **settings}, folder)
    try:
        yield stack
    finally:
        print(stack.run("logs", "--tail", "20", check=False).decode(errors="replace"))
        stack.down()
