"""Weights as people have them: found in their files, fitted to the net, or rejected in one line."""

import argparse
import logging
import pathlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convoy.training import nets
from convoy.training.errors import CheckpointError
from convoy.training.weights import WeightsOptions, load_into, read_weights

IMAGES = torch.randn(2, 3, 32, 32)


def make_net() -> nn.Module:
    return nets.create("net_res_deep", n_chans1=8, n_blocks=1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(1)
    net = make_net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    return net.eval()


def reload(path: Path, options: WeightsOptions | None = None) -> Tensor:
    """What a fresh net answers with the weights of a file."""
    fresh = make_net()
    load_into(fresh, read_weights(path, options), str(path))
    with torch.no_grad():
        return fresh.eval()(IMAGES)


def answer(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(IMAGES)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights"])
def test_the_usual_keys_are_known(key: str, net: nn.Module, tmp_path: Path) -> None:
    content = {key: net.state_dict(), "optimizer": {"lr": 0.1}, "epoch": 7}
    torch.save(content, tmp_path / "w.pth")
    assert torch.equal(reload(tmp_path / "w.pth"), answer(net))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "model._orig_mod."]
)
def test_prefixes_of_wrappers_are_removed(prefix: str, net: nn.Module, tmp_path: Path) -> None:
    wrapped = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save(wrapped, tmp_path / "w.pth")
    assert torch.equal(reload(tmp_path / "w.pth"), answer(net))


def test_real_wrappers_of_torch(net: nn.Module, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pth")
    assert torch.equal(reload(tmp_path / "averaged.pth"), answer(net))
    compiled = torch.compile(net)
    torch.save(compiled.state_dict(), tmp_path / "compiled.pth")
    assert torch.equal(reload(tmp_path / "compiled.pth"), answer(net))


def test_a_lightning_checkpoint_with_more_than_the_net(
    net: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {f"model.{name}": value for name, value in net.state_dict().items()}
    content = {
        "state_dict": {**weights, "criterion.weight": torch.ones(10)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert torch.equal(reload(tmp_path / "last.ckpt"), answer(net))
    assert "left out 1 tensors" in caplog.text


def test_a_net_that_has_an_attribute_called_model_keeps_it(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    torch.save(Outer().state_dict(), tmp_path / "w.pth")
    load_into(Outer(), read_weights(tmp_path / "w.pth"), "w.pth")


def test_the_choice_between_weights_and_their_average_is_reported(
    net: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_net().eval()
    content = {"state_dict": plain.state_dict(), "state_dict_ema": net.state_dict()}
    path = tmp_path / "both.pth.tar"
    torch.save(content, path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(reload(path), answer(plain))
    assert "used 'state_dict'; the file also has 'state_dict_ema'" in caplog.text
    assert torch.equal(reload(path, WeightsOptions(ema=True)), answer(net))
    torch.save({"state_dict": plain.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"ema: expected one of .*found 'state_dict'"):
        read_weights(path, WeightsOptions(ema=True))


def test_numpy_scalars_and_namespaces_beside_the_weights(net: nn.Module, tmp_path: Path) -> None:
    content = {
        "state_dict": net.state_dict(),
        "args": argparse.Namespace(lr=0.1, name="run"),
        "best": np.float64(0.93),
        "epoch": np.int64(3),
        "history": np.array([1.0, 2.0], np.float32),
    }
    torch.save(content, tmp_path / "w.pth")
    assert torch.equal(reload(tmp_path / "w.pth"), answer(net))


def test_any_other_object_is_rejected_by_its_name_and_not_made(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (pathlib.Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": {"w": torch.ones(1)}, "callback": Trap()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"contains .* objects.*save the weights alone"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"contains torch\.nn\.modules\.linear\.Linear"):
        read_weights(tmp_path / "whole.pth")


def test_old_densenet_keys() -> None:
    net = nets.create("densenet121", n_classes=10).eval()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): value
        for name, value in net.state_dict().items()
        # Files of that time have no counters.
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    fresh = nets.create("densenet121", n_classes=10).eval()
    load_into(fresh, old, "densenet")
    with torch.no_grad():
        assert torch.equal(fresh(IMAGES), net(IMAGES))


def test_mnasnet_keeps_the_version_of_its_format(tmp_path: Path) -> None:
    net = nets.create("mnasnet0_5", n_classes=10).eval()
    # A plain dict has lost it, as safetensors has.
    load_into(nets.create("mnasnet0_5", n_classes=10), dict(net.state_dict()), "mnasnet")


def test_the_key_and_the_prefix_can_be_named(
    net: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {f"student.{name}": value for name, value in net.state_dict().items()}
    weights |= {f"teacher.{name}": value for name, value in make_net().state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save({"run": {"latest": weights}}, path)
    with pytest.raises(CheckpointError, match=r"found 'run' \(dict\); name it with --state-dict"):
        read_weights(path)
    with pytest.raises(CheckpointError, match=r"state_dict_key 'run\.best': expected 'best'"):
        read_weights(path, WeightsOptions(key="run.best"))
    with pytest.raises(CheckpointError, match="strip_prefix: expected names that begin with 'x'"):
        read_weights(path, WeightsOptions(key="run.latest", prefix="x"))
    options = WeightsOptions(key="run.latest", prefix="student.")
    assert torch.equal(reload(path, options), answer(net))
    assert "left out tensors without the prefix 'student.'" in caplog.text


def test_a_message_names_what_differs(net: nn.Module, tmp_path: Path) -> None:
    weights = dict(net.state_dict())
    weights["fc2.weight"] = torch.zeros(1000, 32)
    weights["extra.weight"] = weights.pop("conv1.bias")
    message = (
        r"w\.pth: expected the \d+ tensors of the net, got \d+; missing: 'conv1\.bias'; "
        r"unknown: 'extra\.weight'; of another shape: 'fc2\.weight' "
        r"\(\[1000, 32\] in the file, \[10, 32\] in the net\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load_into(make_net(), weights, "w.pth")


def test_programs_are_named_as_such(tmp_path: Path) -> None:
    traced = torch.jit.trace(make_net().eval(), IMAGES)
    torch.jit.save(traced, tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript program; use convoy-export import"):
        read_weights(tmp_path / "script.pt")
    program = torch.export.export(make_net().eval(), (IMAGES,))
    torch.export.save(program, tmp_path / "program.pt2")
    with pytest.raises(CheckpointError, match=r"is a torch\.export program"):
        read_weights(tmp_path / "program.pt2")
