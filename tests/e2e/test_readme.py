"""The tutorial in README.md, command by command in a fresh folder, as a new user runs it."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "README.md").read_text().split("## Tutorial")[1].split("\n## ")[0]
PYTHON = re.search(r"```python\n(.*?)```", TUTORIAL, re.S)[1]


@dataclass(frozen=True)
class Step:
    """A command of the tutorial and the lines shown below it; `…` stands for any text."""

    command: str
    output: tuple[str, ...]


def steps() -> list[Step]:
    found = []
    for block in re.findall(r"```\n(\$ .*?)```", TUTORIAL, re.S):
        for part in block.removeprefix("$ ").split("\n$ "):
            command, *output = part.rstrip("\n").split("\n")
            found.append(Step(command, tuple(output)))
    return found


def form(text: str) -> str:
    """What does not vary between runs and terminals: words, without numbers and table borders."""
    words = re.sub(r"[\s━─╇┃│]+", " ", text)
    numbers = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", words).strip()
    return re.sub(r"(?<= )-(?= )", "N", numbers)  # a percentile of too few samples


def matches(shown: tuple[str, ...], printed: list[str]) -> bool:
    """Tell whether the printed lines have the form of those shown, in order and completely."""
    parts = " ".join(shown).split("…")
    pattern = ".*".join(re.escape(form(part)) for part in parts)
    return re.fullmatch(pattern, form(" ".join(printed))) is not None


def free_ports() -> tuple[int, int]:
    """Two ports in a row, as the defaults are: `convoy-client bench` finds the metrics by that."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
                return port, port + 1


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Tutorial"]:
    tutorial = Tutorial(tmp_path_factory.mktemp("tutorial"), *free_ports())
    yield tutorial
    if tutorial.server:
        with tutorial.server as server:
            server.terminate()
        assert server.returncode == 0


class Tutorial:
    """A folder and free ports in which the commands run one after the other."""

    def __init__(self, folder: Path, port: int, metrics_port: int) -> None:
        self.folder = folder
        self.ports = {"8001": str(port), "8002": str(metrics_port)}
        self.server: subprocess.Popen[str] | None = None
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CONVOY_PORT": str(port),
            "CONVOY_METRICS_PORT": str(metrics_port),
            "CONVOY_ADDRESS": f"127.0.0.1:{port}",
            "COLUMNS": "100",
        }

    def here(self, text: str) -> str:
        """Replace the default ports by those of this test."""
        return re.sub("800[12]", lambda found: self.ports[found[0]], text)

    def run(self, step: Step) -> list[str]:
        if step.command.startswith("convoy-server"):
            return self.serve(step)
        done = subprocess.run(
            ["bash", "-c", self.here(step.command)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    def serve(self, step: Step) -> list[str]:
        self.server = subprocess.Popen(
            step.command.split(),
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = []
        for line in self.server.stderr:
            # Logged only where other processes disturb the warm-up.
            if "measured under disturbance" in line:
                continue
            lines.append(line.rstrip())
            if "serving" in line:
                break
        return lines


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.command[:40])
def test_each_command_works_and_prints_what_is_shown(tutorial, step):
    printed = tutorial.run(step)
    assert matches(step.output, printed), "\n".join(printed)


def test_the_python_example_works(tutorial):
    program = f"{tutorial.here(PYTHON)}\nassert answer.best.label == '7', answer"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tutorial.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_output_is_noticed():
    assert matches(("a 1.5 b", "…", "end"), ["a 27   b", "x", "y", "end"])
    assert not matches(("a 1.5 b", "end"), ["a 27 b", "more", "end"])
