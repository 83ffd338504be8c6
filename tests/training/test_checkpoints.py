import pickle
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convoy.training import checkpoints, nets
from convoy.training.checkpoints import Architecture, Checkpoint, DataDescription
from convoy.training.data import Preprocessing
from convoy.training.errors import CheckpointError
from convoy.training.weights import read_weights


def make_checkpoint(**arguments: object) -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(
        state_dict=nets.create("net_res_deep", **arguments).state_dict(),
        architecture=Architecture("net_res_deep", arguments),
        data=DataDescription(
            "digits", ("a", "b"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), Preprocessing()
        ),
        metrics={"valid_accuracy": 0.5},
        temperature=1.5,
    )


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(n_classes=2, n_blocks=2)
    checkpoints.save(tmp_path / "best.pt", checkpoint)
    loaded = checkpoints.load(tmp_path / "best.pt")
    assert loaded.data == checkpoint.data
    assert (loaded.metrics, loaded.temperature) == ({"valid_accuracy": 0.5}, 1.5)
    net = nets.create("net_res_deep", n_classes=2, n_blocks=2)
    net.load_state_dict(checkpoint.state_dict)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(loaded.build_net()(images), net.eval()(images))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_the_file_is_a_plain_dict_for_weights_only(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "best.pt", make_checkpoint(n_blocks=1), {"epoch": 3})
    content = torch.load(tmp_path / "best.pt", map_location="cpu", weights_only=True)
    assert (content["format"], content["format_version"]) == ("convoy-checkpoint", 1)
    assert content["data"]["classes"] == ["a", "b"]
    assert checkpoints.load_training_state(tmp_path / "best.pt") == {"epoch": 3}


def test_shared_blocks_never_load_silently_as_distinct_ones(tmp_path: Path) -> None:
    shared = make_checkpoint(n_blocks=2, shared_blocks=True)
    checkpoints.save(tmp_path / "shared.pt", shared)
    net = checkpoints.load(tmp_path / "shared.pt").build_net()
    assert net.resblocks[0] is net.resblocks[1]


def test_weights_of_another_net_are_rejected() -> None:
    foreign = replace(make_checkpoint(n_blocks=2), architecture=Architecture("net", {}))
    with pytest.raises(CheckpointError, match=r"missing: .*unknown: "):
        foreign.build_net()


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit(99)",))


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Payload(), protocol=2))
    torch.save({"format": "convoy-checkpoint", "x": _Payload()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(CheckpointError, match=r"contains (builtins\.)?exec objects"):
            checkpoints.load(tmp_path / name)


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, {"format": "convoy-checkpoint", "format_version": 2}, [1]]
)
def test_a_foreign_file_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="expected"):
        checkpoints.load(tmp_path / "foreign.pt")


def test_missing_and_damaged_files_are_rejected(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "whole.pt", make_checkpoint(n_blocks=1))
    half = (tmp_path / "whole.pt").read_bytes()[:5000]
    (tmp_path / "half.pt").write_bytes(half)
    for name in ("half.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoints.load(tmp_path / name)


def test_a_failed_save_is_an_error_that_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save(path, make_checkpoint(n_blocks=1))
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A full disk, as far as one process can make one: no file may grow over 10 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*last\.pt"):
            checkpoints.save(path, make_checkpoint(n_blocks=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_come_from_any_usual_file(tmp_path: Path, prefix: str) -> None:
    weights = nets.create("net").state_dict()
    wrapped = {prefix + name: value for name, value in weights.items()}
    torch.save(wrapped, tmp_path / "w.pt")
    save_file(wrapped, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        read = read_weights(tmp_path / name)
        assert list(read) == sorted(weights) or list(read) == list(weights)
        assert all(torch.equal(read[key], weights[key]) for key in weights)
