"""`convoy-export check`: what a file is, what is missing, and the command that would publish it."""

import shlex
import sys
from pathlib import Path

import onnx
import pytest
import torch

from convoy.export.__main__ import main
from convoy.export.inspection import matching_nets
from convoy.training import nets
from tests.export import graphs
from tests.export.test_foreign import TRITON, write_triton


def check(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int = 0
) -> str:
    monkeypatch.setattr(sys, "argv", ["convoy-export", "check", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_an_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(graphs.model(), path)
    output = check(path, monkeypatch, capsys)
    assert "an ONNX file" in output
    assert "float32, NCHW, 32 x 32 px, any batch; weights in fp32" in output
    assert "missing: --labels, --mean, --std\n" in output
    # The command works once the labels are there.
    command = shlex.split(output.splitlines()[-1])
    assert command[:2] == ["convoy-export", "import"]
    (tmp_path / "labels.txt").write_text("\n".join("0123456789"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert (tmp_path / "models" / "net" / "1" / "manifest.json").is_file()


def test_an_onnx_file_with_a_softmax_and_a_free_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = [
        *graphs.nodes(scores="raw"),
        onnx.helper.make_node("Softmax", ["raw"], ["output"], axis=1),
    ]
    path = tmp_path / "net.onnx"
    onnx.save(graphs.model(body, image=("n", 3, "h", "w")), path)
    output = check(path, monkeypatch, capsys)
    assert "ends in probabilities" in output
    assert "missing: --labels, --mean, --std, --image-size-px" in output
    assert output.rstrip().endswith("--image-size-px 224 --output probabilities")


@pytest.mark.slow
def test_weights_of_torchvision_are_recognized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = nets.create("squeezenet1_1", n_classes=10)
    path = tmp_path / "w.pth"
    torch.save({"model": net.state_dict()}, path)
    output = check(path, monkeypatch, capsys)
    assert "they fit torchvision's squeezenet1_1" in output
    assert f"convoy-export weights {path} --architecture squeezenet1_1 --name w" in output
    assert matching_nets({"other.weight": torch.zeros(1)}) == []


def test_a_checkpoint_of_ours(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = check(tiny_checkpoint, monkeypatch, capsys)
    assert "a checkpoint of convoy-train: net_res_deep, 10 classes" in output
    assert f"convoy-export {tiny_checkpoint} --name best" in output


def test_a_triton_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_triton(tmp_path / "theirs", TRITON)
    output = check(tmp_path / "theirs", monkeypatch, capsys)
    assert "a Triton model folder" in output
    assert "the files state: classes: 10" in output
    assert "missing: --mean, --std\n" in output


def test_what_is_no_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.onnx").write_text("not a model")
    output = check(tmp_path / "notes.onnx", monkeypatch, capsys, status=2)
    assert output.count("\n") == 1
    assert "expected an ONNX file" in output
