"""Real processes for tests: console commands, and a server on free ports."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 60
LOG_TIMEOUT_S = 60
# The ways that gRPC is answered; each must do all that the others do.
GRPC_FLAGS: dict[str, tuple[str, ...]] = {
    "h2corn": (),
    "grpcio": ("--transport", "grpcio"),
    "front ends": ("--front-ends", "2"),
}

_WITHOUT_COLLECTOR = """
import gc
gc.disable()
from convoy.server.__main__ import main
main()
"""


def run_module(module: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE` to its end and returns what it printed."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@dataclass
class ServerProcess:
    """A convoy-server that reported ready.

    Attributes:
        address: The port for callers, "127.0.0.1:PORT".
        url: REST and the page, "http://127.0.0.1:PORT", or https:// with TLS.
        metrics: The port for operators, "http://127.0.0.1:PORT".
        events: Its log lines so far.
    """

    process: subprocess.Popen[str]
    address: str = ""
    url: str = ""
    metrics: str = ""
    events: list[dict[str, object]] = field(default_factory=list)

    def wait_for(self, event: str, **fields: object) -> dict[str, object]:
        """Waits for a line of its log and returns it."""
        for _ in range(LOG_TIMEOUT_S * 100):
            for line in list(self.events):
                if line["event"] == event and fields.items() <= line.items():
                    return line
            time.sleep(0.01)
        raise TimeoutError(f"no log line {event!r} with {fields}, but: {self.events}")

    def metric(self, name: str, **labels: str) -> float:
        """Returns the sum of a metric's samples that have these labels."""
        with urllib.request.urlopen(f"{self.metrics}/metrics", timeout=60) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for_metric(self, name: str, least: float, **labels: str) -> None:
        """Wait until a metric is at least so much."""
        deadline_s = time.monotonic() + LOG_TIMEOUT_S
        while (found := self.metric(name, **labels)) < least:
            assert time.monotonic() < deadline_s, f"{name} is {found}, expected {least}"
            time.sleep(0.05)

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)


@contextmanager
def running_server(
    repository: Path, *flags: object, collector: bool = True
) -> Iterator[ServerProcess]:
    """Starts a server on free loopback ports, waits until it serves, and stops it at the end.

    Args:
        repository: The models.
        flags: Further flags.
        collector: Whether Python's garbage collector runs in it.
    """
    start = ["-m", "convoy.server"] if collector else ["-c", _WITHOUT_COLLECTOR]
    command = [sys.executable, *start, "--repository", str(repository)]
    command += ["--port", "0", "--metrics-port", "0", "--log-format", "json", *map(str, flags)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        scheme = "https" if "--tls-certificate" in command else "http"
        server = ServerProcess(process, url=f"{scheme}://")
        serving = threading.Event()
        reader = threading.Thread(target=_read_log, args=(server, serving), daemon=True)
        reader.start()
        try:
            serving.wait(START_TIMEOUT_S)
            if not server.address:
                raise RuntimeError(f"the server did not start: {server.events}")
            yield server
        finally:
            process.kill() if process.poll() is None and not server.address else server.stop()
            reader.join()


def _read_log(server: ServerProcess, serving: threading.Event) -> None:
    assert server.process.stderr
    for line in server.process.stderr:
        try:
            event = json.loads(line)
        except ValueError:
            event = {"event": line.rstrip()}
        server.events.append(event)
        if event["event"] == "serving":
            server.address = event["address"]
            server.url += event.get("rest", event["address"])
            server.metrics = f"http://{event['metrics']}"
            serving.set()
    serving.set()
