"""Versions appear whole or not at all, whoever else exports and whenever the exporter dies."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convoy.export.errors import InputError, PublishError
from convoy.export.repository import ModelFolder

PUBLISH_AND_DIE = """
import os, signal, sys
from pathlib import Path
from convoy.export.repository import ModelFolder

repository, fatal_step = Path(sys.argv[1]), int(sys.argv[2])
EVENTS = {"open", "os.mkdir", "os.chmod", "os.rename", "fcntl.flock", "os.rmdir", "os.remove"}
steps = 0

def die_at_the_step(event, arguments):
    global steps
    if event not in EVENTS or (event == "open" and str(repository) not in str(arguments[0])):
        return
    steps += 1
    if steps == fatal_step:
        os.kill(os.getpid(), signal.SIGKILL)

def seal(folder, version):
    (folder / "manifest.json").write_text(f'{{"version": {version}}}')

sys.addaudithook(die_at_the_step)
target = ModelFolder(repository, "digits")
with target.stage() as staged:
    (staged / "model.onnx").write_bytes(b"weights")
    (staged / "samples.npz").write_bytes(b"samples")
    target.publish(staged, seal)
"""


def publish_once(target: ModelFolder) -> int:
    def seal(folder: Path, version: int) -> None:
        (folder / "manifest.json").write_text(str(version))

    with target.stage() as staged:
        (staged / "model.onnx").write_bytes(os.urandom(64))
        return target.publish(staged, seal)


def loadable(repository: Path) -> list[Path]:
    """What a server would take for a version: a folder with a number for a name."""
    return [path for path in repository.glob("*/*") if path.name.isdigit()]


@pytest.mark.slow
def test_a_sigkill_at_any_step_leaves_nothing_or_the_whole_version(tmp_path: Path) -> None:
    survived, killed_with_nothing = 0, 0
    for step in range(1, 100):
        repository = tmp_path / str(step)
        done = subprocess.run(
            [sys.executable, "-c", PUBLISH_AND_DIE, repository, str(step)], check=False
        )
        for version in loadable(repository):
            assert {entry.name for entry in version.iterdir()} == {
                "manifest.json",
                "model.onnx",
                "samples.npz",
            }
            assert (version / "manifest.json").read_text() == '{"version": 1}'
        if done.returncode == 0:
            survived = step
            break
        assert done.returncode == -signal.SIGKILL
        killed_with_nothing += not loadable(repository)
        assert publish_once(ModelFolder(repository, "digits")) in {1, 2}
        assert not list(repository.glob("*/.*.partial")), "the next exporter sweeps the leftovers"
    assert killed_with_nothing >= 10
    assert survived > killed_with_nothing


def test_concurrent_exporters_get_different_versions(tmp_path: Path) -> None:
    target = ModelFolder(tmp_path, "digits")
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: publish_once(target), range(24)))
    assert sorted(versions) == list(range(1, 25))
    for version in versions:
        assert (tmp_path / "digits" / str(version) / "manifest.json").read_text() == str(version)


def test_processes_that_start_together_get_different_versions(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISH_AND_DIE, str(tmp_path), "0"]
    started = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in started] == [0, 0, 0, 0]
    assert sorted(path.name for path in loadable(tmp_path)) == ["1", "2", "3", "4"]


def test_the_folder_of_a_running_export_is_not_removed(tmp_path: Path) -> None:
    target = ModelFolder(tmp_path, "digits")
    with target.stage() as slow:
        (slow / "model.onnx").write_bytes(b"being written")
        assert publish_once(target) == 1
        assert (slow / "model.onnx").read_bytes() == b"being written"
        assert slow.name.startswith(".1.")
        assert slow.name.endswith(".partial")


def test_a_failure_while_staging_leaves_no_trace(tmp_path: Path) -> None:
    def fail(staged: Path) -> None:
        (staged / "model.onnx").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ModelFolder(tmp_path, "digits").stage() as staged:
        fail(staged)
    assert not list(tmp_path.iterdir())


def test_a_failing_seal_publishes_nothing(tmp_path: Path) -> None:
    def seal(folder: Path, version: int) -> None:
        raise OSError(28, "No space left on device")

    target = ModelFolder(tmp_path, "digits")
    with pytest.raises(PublishError, match="No space left"), target.stage() as staged:
        target.publish(staged, seal)
    assert not list(tmp_path.iterdir())


def test_published_files_are_read_only(tmp_path: Path) -> None:
    publish_once(ModelFolder(tmp_path, "digits"))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "digits" / "1").iterdir()}
    assert modes == {0o444}


def test_numbers_count_on_and_other_folders_do_not_matter(tmp_path: Path) -> None:
    for name in ("7", "010", "notes", "12.bak"):
        (tmp_path / "digits" / name).mkdir(parents=True)
    assert publish_once(ModelFolder(tmp_path, "digits")) == 8


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", ".hidden", "a" * 65, "x\n"])
def test_names_that_are_no_plain_folder_are_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name: expected"):
        ModelFolder(tmp_path, name)
