"""The command: one published version, or one line on stderr and nothing in the repository."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import convoy.export
from convoy.export.__main__ import main
from convoy.training import checkpoints, nets


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convoy-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_checkpoint_as_the_first_word_is_published(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository = tmp_path / "models"
    arguments = [tiny_checkpoint, "--repository", repository, "--name", "digits"]
    assert run(monkeypatch, *arguments, "--format", "torchscript") == 0
    assert (repository / "digits" / "1" / "manifest.json").is_file()
    shown = capsys.readouterr().out
    assert "model.torchscript" in shown
    assert "largest" in shown
    assert "published" in shown


def test_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"convoy-export {convoy.export.__version__}\n"
    assert importlib.metadata.version("convoy-serving") == convoy.export.__version__


def test_the_threshold_to_abstain_below_goes_into_the_manifest(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [tiny_checkpoint, "--repository", tmp_path, "--name", "digits"]
    arguments += ["--format", "torchscript", "--abstain-below", "0.75"]
    assert run(monkeypatch, *arguments) == 0
    written = json.loads((tmp_path / "digits" / "1" / "manifest.json").read_text())
    assert written["abstain_threshold"] == 0.75
    capsys.readouterr()
    assert run(monkeypatch, "show", tmp_path / "digits" / "1") == 0
    assert "below a probability of 0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["CHECKPOINT", "--name", "digits", "--abstain-below", "2"], "abstain-below"),
        (["nowhere.pt", "--name", "digits"], "nowhere.pt"),
        (["CHECKPOINT"], "--name"),
        ([], "checkpoint"),
        (["CHECKPOINT", "--name", "../digits"], "name: expected"),
        (["CHECKPOINT", "--name", ".hidden"], "name: expected"),
        (["CHECKPOINT", "--name", "digits", "--format", "caffe"], "caffe"),
        (["CHECKPOINT", "--name", "digits", "--data", "imagefolder:nowhere"], "nowhere"),
        (["CHECKPOINT", "--name", "digits", "--data", "imagenet"], "imagenet"),
        (["CHECKPOINT", "--name", "digits", "--no-such-flag"], "no-such-flag"),
        (["NOT_A_CHECKPOINT", "--name", "digits"], "checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    complaint: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rubbish = tmp_path / "rubbish.pt"
    rubbish.write_bytes(b"not a checkpoint")
    paths = {"CHECKPOINT": str(tiny_checkpoint), "NOT_A_CHECKPOINT": str(rubbish)}
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *[paths.get(word, word) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("convoy-export: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["rubbish.pt"]


def test_a_pickle_with_code_is_rejected_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"format": "convoy-checkpoint", "state_dict": Trap()}, tmp_path / "trap.pt")
    assert run(monkeypatch, tmp_path / "trap.pt", "--name", "digits") == 2
    assert not (tmp_path / "sprung").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_data_with_other_classes_is_rejected(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = checkpoints.load(tiny_checkpoint)
    letters = checkpoints.DataDescription(
        "digits",
        tuple("abcdefghij"),
        content.data.mean,
        content.data.std,
        content.data.preprocessing,
    )
    path = tmp_path / "letters.pt"
    checkpoints.save(
        path, checkpoints.Checkpoint(content.state_dict, content.architecture, letters, {})
    )
    assert run(monkeypatch, path, "--repository", tmp_path / "models", "--name", "letters") == 2
    assert "classes" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_repository_that_is_a_file_is_one_line_and_status_1(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "models").write_text("in the way")
    arguments = [tiny_checkpoint, "--repository", tmp_path / "models", "--name", "digits"]
    assert run(monkeypatch, *arguments, "--format", "torchscript") == 1
    captured = capsys.readouterr()
    assert "Not a directory" in captured.err or "File exists" in captured.err
    assert captured.err.count("\n") == 1


def test_the_module_runs_as_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convoy.export", "nowhere.pt", "--name", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_shared_blocks_are_exported_with_a_warning(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = checkpoints.Architecture(
        "net_res_deep", {"n_chans1": 8, "n_blocks": 2, "shared_blocks": True}
    )
    net = nets.create(shared.name, **shared.arguments)
    checkpoint = replace(
        checkpoints.load(tiny_checkpoint), architecture=shared, state_dict=net.state_dict()
    )
    checkpoints.save(tmp_path / "shared.pt", checkpoint)
    flags = ["--repository", tmp_path / "models", "--name", "digits", "--format", "torchscript"]
    assert run(monkeypatch, tmp_path / "shared.pt", *flags) == 0
    assert "warning: all blocks share one batch norm" in capsys.readouterr().err
    assert run(monkeypatch, tiny_checkpoint, *flags) == 0
    assert "one batch norm" not in capsys.readouterr().err
