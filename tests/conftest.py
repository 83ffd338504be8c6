"""What several test folders share: a model repository made by the real chain, a running server."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ServerProcess, run_module, running_server


def pytest_configure() -> None:
    # A shell starts its background jobs deaf to interrupts, and processes of tests inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net trained on digits by convoy-train."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    trained = run_module(
        "training", "--data", "digits", "--model", "net", "--epochs", "3", "--out", out
    )
    assert trained.returncode == 0, trained.stderr
    return out / "best.pt"


@pytest.fixture(scope="session")
def repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `digits` in version 1, written by convoy-export in every format."""
    folder = tmp_path_factory.mktemp("repository")
    formats = [f"--format={name}" for name in ("onnx", "torchscript", "exported-program")]
    exported = run_module(
        "export", checkpoint, "--repository", folder, "--name", "digits", *formats
    )
    assert exported.returncode == 0, exported.stderr
    return folder


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[ServerProcess]:
    """A convoy-server process that serves `repository` on the CPU."""
    with running_server(repository, "--device", "cpu") as process:
        yield process
