import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch

from training import checkpoints
from training.__main__ import main


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["convoy-train", *map(str, arguments)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


def test_a_run_writes_everything_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "digits"
    assert train(monkeypatch, "--model", "airbench", "--epochs", 2, "--out", out) == 0
    checkpoint = checkpoints.load(out / "best.pt")
    assert checkpoint.metrics["test_accuracy"] > 0.9
    assert checkpoint.recipe["epochs"] == 2
    assert checkpoint.data.classes == tuple("0123456789")
    assert checkpoint.temperature != 1
    assert checkpoints.load_training_state(out / "last.pt")["epoch"] == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert json.loads((out / "config.json").read_text())["recipe"]["model"] == "airbench"


def test_events_hold_loss_accuracy_and_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(monkeypatch, "--model", "net", "--epochs", 2, "--out", tmp_path) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"Report", "First layer/filters", "First layer/feature maps"} <= {
        tag.rpartition("/")[0] if tag[-1].isdigit() else tag for tag in events.Tags()["images"]
    }
    assert cv2.imread(str(tmp_path / "report.png")).shape == (400, 1200, 3)
    for tag, name in (
        ("Loss/train", "train_loss"),
        ("Accuracy/valid", "valid_accuracy"),
        ("Learning rate", "lr"),
    ):
        values = [event.value for event in events.Scalars(tag)]
        assert values == pytest.approx([line[name] for line in lines])


def test_ones_own_folder_is_trained_on(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = f"imagefolder:{image_folder}"
    arguments = ("--recipe", "digits", "--model", "net", "--batch-size", 8, "--epochs", 8)
    arguments += ("--set", "shift_px=0")
    assert train(monkeypatch, "--data", data, *arguments, "--out", tmp_path / "run") == 0
    checkpoint = checkpoints.load(tmp_path / "run" / "best.pt")
    assert checkpoint.data.classes == ("bright", "dark")
    assert checkpoint.metrics["test_accuracy"] == 1


@pytest.mark.parametrize("model", ["mobilenet_v3_small", "resnet18"])
def test_a_torchvision_classifier_is_trained_and_reloaded(
    model: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = ("--data", f"imagefolder:{image_folder}", "--recipe", "finetune", "--model", model)
    sizes = ("--image-size", 40, "--set", "resize_shorter_px=48", "--batch-size", 8)
    assert train(monkeypatch, *data, *sizes, "--epochs", 1, "--out", tmp_path / "run") == 0
    checkpoint = checkpoints.load(tmp_path / "run" / "best.pt")
    assert checkpoint.data.preprocessing.resize_shorter_px == 48
    assert checkpoint.build_net()(torch.zeros(3, 3, 40, 40)).shape == (3, 2)


def test_a_stopped_run_resumes_to_the_weights_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model", "net", "--epochs", 3)
    assert train(monkeypatch, *arguments, "--out", tmp_path / "unbroken") == 0
    stopped = (*arguments, "--out", tmp_path / "stopped")
    assert train(monkeypatch, *stopped, "--max-minutes", 0) == 0
    assert checkpoints.load(tmp_path / "stopped" / "last.pt").metrics["epoch"] == 1
    assert train(monkeypatch, *stopped, "--resume") == 0
    ends = [checkpoints.load(tmp_path / name / "last.pt") for name in ("unbroken", "stopped")]
    for name, value in ends[0].state_dict.items():
        assert torch.equal(value, ends[1].state_dict[name]), name
    assert train(monkeypatch, *stopped, "--resume", "--lr", 0.5) == 2


def test_weights_start_a_run_with_other_classes(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = tmp_path / "first"
    assert train(monkeypatch, "--model", "net", "--epochs", 1, "--out", first) == 0
    data = ("--data", f"imagefolder:{image_folder}", "--batch-size", 8, "--lr", 1e-12)
    second = ("--model", "net", "--epochs", 1, "--out", tmp_path / "second")
    assert train(monkeypatch, *data, *second, "--weights", first / "best.pt") == 0
    begun = checkpoints.load(first / "best.pt").state_dict["conv1.weight"]
    ended = checkpoints.load(tmp_path / "second" / "best.pt").state_dict["conv1.weight"]
    torch.testing.assert_close(ended, begun, atol=1e-6, rtol=0)
    other = ("--model", "net_res_deep", "--out", tmp_path / "third")
    assert train(monkeypatch, *data, *other, "--weights", first / "best.pt") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagefolder:/absent"], "expected a folder"),
        (["--data", "mnist"], "got 'mnist'"),
        (["--model", "resnet81"], "got 'resnet81'"),
        (["--recipe", "slow"], "expected one of digits"),
        (["--set", "colour=3"], "unknown setting 'colour'"),
        (["--set", "epochs"], "NAME=VALUE"),
        (["--epochs", "many"], "integer"),
        (["--epochs", "0"], "epochs: expected more than 0"),
        (["--bogus"], "--bogus"),
        (["--batch-size", "5000"], "at most the 1249 training images"),
        (["--device", "cuda:99"], "device: expected"),
        (["--weights", "absent.pt"], "No such file"),
        (["--out", "/proc/run"], "cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(monkeypatch, "--model", "net", *arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_divergence_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--set", "optimizer=sgd", "--set", "l2=1.0", "--set", "schedule=constant")
    code = train(monkeypatch, "--model", "net", "--lr", 1e30, *settings, "--out", tmp_path)
    assert code == 2
    assert "expected a number, got nan" in capsys.readouterr().err
    checkpoints.load(tmp_path / "last.pt").build_net()


def test_ctrl_c_ends_cleanly_and_last_pt_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "--epochs", "500", "--model", "net"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < 90
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped; --resume goes on" in stderr
    assert "Traceback" not in stderr
    assert checkpoints.load_training_state(tmp_path / "last.pt")["epoch"] >= 1
    checkpoints.load(tmp_path / "best.pt").build_net()
