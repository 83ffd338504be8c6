"""What several test folders share: a model repository made by the real chain, a running server."""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

from tests.needs import advice
from tests.processes import ServerProcess, run_module, running_server

ROOT = Path(__file__).parent.parent
LOCK = "requirements.lock"
# Tests in these folders, and tests that can reach these names, train or start processes.
SLOW_FOLDERS = {"chaos", "conformance", "deploy", "e2e", "edge", "gpu", "integration"}
SLOW_NAMES = {"checkpoint", "repository", "server", "run_module", "running_server"}


def pytest_configure() -> None:
    # For torch, here and in the processes that tests start: more threads than processors spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts its background jobs deaf to interrupts, and processes of tests inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folders = set(item.path.relative_to(ROOT / "tests").parts)
        names = {*vars(item.module), *item.fixturenames}  # type: ignore[attr-defined]
        if folders & SLOW_FOLDERS or names & SLOW_NAMES:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if line := advice(str(report.longrepr) for report in skipped):
        terminalreporter.write_line(line)


def made_once(
    config: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    make: Callable[[Path], None],
) -> Path:
    """Return a folder that one worker of pytest-xdist makes and all of a run share.

    pytest's cache keeps a copy for later runs, until what makes it changes.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_suffix(".done")
    kept = config.cache.mkdir(f"made-{_makers_digest()}") / name
    with FileLock(folder.with_suffix(".lock")), FileLock(kept.with_suffix(".lock")):
        if done.exists():
            return folder
        if not kept.exists():
            make(folder)
            fresh = kept.with_suffix(".fresh")
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(folder, fresh)
            fresh.rename(kept)
        elif not folder.exists():
            shutil.copytree(kept, folder)
        done.touch()
    return folder


@cache
def _makers_digest() -> str:
    """Digest whatever decides on the content of a checkpoint and a published version."""
    digest = hashlib.sha256(version("torch").encode())
    sources = [*ROOT.glob("training/**/*.py"), *ROOT.glob("export/**/*.py"), ROOT / LOCK]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def checkpoint(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net trained on digits by convoy-train."""

    def train(out: Path) -> None:
        trained = run_module(
            "convoy.training", "--data", "digits", "--model", "net", "--epochs", "3", "--out", out
        )
        assert trained.returncode == 0, trained.stderr

    return made_once(pytestconfig, tmp_path_factory, "checkpoint", train) / "best.pt"


@pytest.fixture(scope="session")
def repository(
    checkpoint: Path, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model repository with `digits` in version 1, written by convoy-export in every format."""

    def export(folder: Path) -> None:
        formats = [f"--format={name}" for name in ("onnx", "torchscript", "exported-program")]
        exported = run_module(
            "convoy.export", checkpoint, "--repository", folder, "--name", "digits", *formats
        )
        assert exported.returncode == 0, exported.stderr

    return made_once(pytestconfig, tmp_path_factory, "repository", export)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[ServerProcess]:
    """A convoy-server process that serves `repository` on the CPU."""
    with running_server(repository, "--device", "cpu") as process:
        yield process
