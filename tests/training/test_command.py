import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from convoy.training import __version__, checkpoints, nets
from convoy.training.__main__ import main
from convoy.training.data import Shares


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, "--model", "airbench", "--epochs", 2, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def events(finished: Path) -> EventAccumulator:
    return EventAccumulator(str(finished / "tensorboard")).Reload()


def test_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"convoy-train {__version__}\n"


def read_lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_everything_it_promises(finished: Path) -> None:
    checkpoint = checkpoints.load(finished / "best.pt")
    assert checkpoint.metrics["test_accuracy"] > 0.9
    assert checkpoint.recipe["epochs"] == 2
    assert checkpoint.data.classes == tuple("0123456789")
    assert checkpoint.temperature != 1
    assert checkpoints.load_training_state(finished / "last.pt")["epoch"] == 2
    assert [line["epoch"] for line in read_lines(finished)] == [1, 2]
    assert json.loads((finished / "config.json").read_text())["recipe"]["model"] == "airbench"
    assert cv2.imread(str(finished / "report.png")).shape == (400, 1200, 3)
    assert "airbench on digits" in (finished / "report.html").read_text()


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Loss/train", "train_loss"),
        ("Loss/valid", "valid_loss"),
        ("Loss/penalty", "penalty"),
        ("Accuracy/train", "train_accuracy"),
        ("Accuracy/valid", "valid_accuracy"),
        ("Learning rate", "lr"),
        ("Images per second", "images_per_s"),
    ],
)
def test_events_hold_the_numbers_of_every_epoch(
    tag: str, name: str, finished: Path, events: EventAccumulator
) -> None:
    expected = [line[name] for line in read_lines(finished)]
    assert [event.value for event in events.Scalars(tag)] == pytest.approx(expected)
    assert [event.step for event in events.Scalars(tag)] == [1, 2]


def test_events_hold_the_pictures_and_the_graph(events: EventAccumulator) -> None:
    pictures = {
        "Report",
        "Confusion matrix",
        "Calibration",
        "First layer/filters",
        "First layer/feature maps",
        "Misclassified",
    }
    assert set(events.Tags()["images"]) == pictures
    nodes = " ".join(node.name for node in events.Graph().node)
    for layer in ("AirbenchNet/Conv2d[whitening]", "_Block[2]/BatchNorm2d[norm2]", "Linear[head]"):
        assert layer in nodes


def test_events_hold_the_settings_beside_the_final_metrics(
    finished: Path, events: EventAccumulator
) -> None:
    stored = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(stored["_hparams_/session_start_info"])
    settings = start.session_start_info.hparams
    assert settings["model"].string_value == "airbench"
    assert settings["lr"].number_value == 2e-3
    for name, value in checkpoints.load(finished / "best.pt").metrics.items():
        assert [e.value for e in events.Scalars(f"final/{name}")] == pytest.approx([value])


def test_a_users_folder_is_trained_on(
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_files_and_memory_end_with_the_same_weights(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("--data", f"imagefolder:{image_folder}", "--recipe", "digits", "--epochs", 2)
    arguments += ("--model", "net", "--batch-size", 8)
    assert train(monkeypatch, *arguments, "--out", tmp_path / "memory") == 0
    streamed = ("--stream", "--workers", 0, "--out", tmp_path / "files")
    assert train(monkeypatch, *arguments, *streamed) == 0
    ends = [checkpoints.load(tmp_path / name / "best.pt") for name in ("memory", "files")]
    assert ends[0].metrics == ends[1].metrics
    for name, value in ends[0].state_dict.items():
        assert torch.equal(value, ends[1].state_dict[name]), name


@pytest.mark.slow
def test_training_stops_early_when_validation_gets_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = ("--model", "net", "--lr", 1e-30, "--set", "weight_decay=0.0", "--set", "shift_px=0")
    patience = ("--epochs", 9, "--set", "patience=2")
    assert train(monkeypatch, *still, *patience, "--out", tmp_path) == 0
    assert [line["epoch"] for line in read_lines(tmp_path)] == [1, 2, 3]
    assert checkpoints.load(tmp_path / "best.pt").metrics["epoch"] == 1


def test_a_new_users_folder_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Phone photos: a HEIC, two broken files, a stray folder, uneven classes, odd names."""
    rng = np.random.default_rng(0)
    for name, level, count in (("cat", 60, 60), ("dog", 180, 5)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(level - 30, level + 30, (90, 120, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"IMG_{index}.JPG")
        (folder / f"broken{name}.jpg").write_bytes(b"\xff\xd8 cut")
    (tmp_path / "photos" / "cat" / "IMG_9.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "photos" / "old notes").mkdir()
    data = ("--data", f"imagefolder:{tmp_path / 'photos'}", "--cache-dir", tmp_path / "cache")
    arguments = ("--recipe", "digits", "--model", "net", "--batch-size", 8, "--epochs", 2)
    sized = (*arguments, "--valid-share", 0.2, "--test-share", 0.2, "--out", tmp_path / "run")
    assert train(monkeypatch, *data, *sized) == 2
    error = capsys.readouterr().err
    assert "data: 2 unreadable images (--skip-bad skips them): train, class 'cat': " in error
    assert len(error.splitlines()) == 1
    assert train(monkeypatch, *data, *sized, "--skip-bad", "--set", "balance=weights") == 0
    shown = capsys.readouterr().out
    assert "IMG_9.HEIC: is HEIC, which is not supported; convert it" in shown
    assert "old notes: is a folder without images" in shown
    assert "uneven: 38 training images of 'cat', 3 of 'dog'" in shown
    assert "brokencat.jpg" in shown
    checkpoint = checkpoints.load(tmp_path / "run" / "best.pt")
    assert checkpoint.data.shares == Shares(0.2, 0.2)
    assert "IMG_9.HEIC" in (tmp_path / "run" / "report.html").read_text()
    resumed = (*data, *sized, "--skip-bad", "--resume", "--epochs", 3, "--test-share", 0.3)
    assert train(monkeypatch, *resumed) == 2
    assert (
        "resume: shares: expected those of last.pt, Shares(valid=0.2, test=0.2), got "
        in capsys.readouterr().err
    )


def test_inspect_and_cache_say_what_is_there(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = ("--cache-dir", tmp_path / "cache")
    (image_folder / "train" / "dark" / "bad.png").write_bytes(b"no image")
    spec = f"imagefolder:{image_folder}"
    assert train(monkeypatch, "inspect", spec, "--image-size", 16, *kept) == 0
    shown = capsys.readouterr().out
    assert "36 train, 4 valid, 8 test, 2 classes" in shown
    assert "images of 36 x 40 px are resized to 16 x 16 px" in shown
    assert "bad.png" in shown
    assert train(monkeypatch, "cache", "list", *kept) == 0
    assert "1 entries, " in capsys.readouterr().out  # of test: train has an unreadable image
    assert train(monkeypatch, "cache", "prune", "--cache-gib", 0, *kept) == 0
    assert "deleted from" in capsys.readouterr().out
    assert not list((tmp_path / "cache").iterdir())
    assert train(monkeypatch, "inspect", "digits") == 0
    assert "1249 train, 249 valid, 299 test, 10 classes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", ["net", "resnet18"])
def test_a_frozen_backbone_keeps_weights_and_statistics(
    model: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(5)
    weights = nets.create(model, n_classes=7, image_size=32).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    arguments = ("--data", f"imagefolder:{image_folder}", "--model", model, "--batch-size", 8)
    arguments += ("--recipe", "digits", "--epochs", 1, "--set", "freeze_backbone=true")
    frozen = ("--weights", tmp_path / "weights.pt", "--out", tmp_path / "run")
    assert train(monkeypatch, *arguments, *frozen) == 0
    ended = checkpoints.load(tmp_path / "run" / "last.pt").state_dict
    head = "fc2." if model == "net" else "fc."
    for name, value in weights.items():
        if not name.startswith(head):
            assert torch.equal(ended[name], value), name
    assert ended[f"{head}weight"].shape[0] == 2
    begun = checkpoints.load_training_state(tmp_path / "run" / "last.pt")["optimizer"]["state"]
    assert len(begun) == 2  # the head's weight and bias
    assert train(monkeypatch, *arguments, "--out", tmp_path / "none") == 2


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = ("--model", "net", "--epochs", 3, "--out", tmp_path)
    assert train(monkeypatch, *stopped, "--max-minutes", 0) == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("best.pt", "last.pt")}
    capsys.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A full disk, as far as one process can make one: no file may grow over 50 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        assert train(monkeypatch, *stopped, "--resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    stderr = capsys.readouterr().err.splitlines()
    assert len(stderr) == 1
    assert "cannot write" in stderr[0]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.slow
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
        (["--set", "color=3"], "unknown setting 'color'"),
        (["--set", "epochs"], "NAME=VALUE"),
        (["--epochs", "many"], "integer"),
        (["--epochs", "0"], "epochs: expected more than 0"),
        (["--bogus"], "--bogus"),
        (
            ["--set", "growth_share=0.5", "--set", "start_px=4"],
            "net does not accept images of 4 px",
        ),
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_last_pt_is_whole(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convoy.training", "--epochs", "500", "--model", "net"]
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
        assert time.monotonic() - began < 240
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped; --resume continues" in stderr
    assert "Traceback" not in stderr
    state = checkpoints.load_training_state(tmp_path / "last.pt")
    assert state["epoch"] >= 1
    # Up to the step that the signal came in, whatever is left of the epoch.
    epochs = len(metrics.read_text().splitlines())
    assert state["epoch"] == epochs
    assert state["step"] == epochs * 20 + state["batch"]
    checkpoints.load(tmp_path / "best.pt").build_net()
