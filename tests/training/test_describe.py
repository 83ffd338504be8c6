import random
import sys

import pytest
import torch
from torch import nn

from convoy.training import nets
from convoy.training.__main__ import main
from convoy.training.describe import describe, output_shape, trace_layers


def test_the_formula_equals_conv2d_and_pooling_on_random_arguments() -> None:
    rng = random.Random(0)
    for _ in range(200):
        kernel, stride, dilation = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 3)
        padding = rng.randint(0, kernel // 2)
        shape = (2, rng.randint(13, 40), rng.randint(13, 40))
        pooling = {"stride": stride, "padding": padding}
        for module in (
            nn.Conv2d(2, 3, kernel, stride, padding, dilation),
            nn.MaxPool2d(kernel, dilation=dilation, **pooling),
            nn.AvgPool2d(kernel, **pooling),
        ):
            assert output_shape(module, shape) == tuple(module(torch.zeros(1, *shape)).shape[1:])


@pytest.mark.parametrize("name", ["net", "net_res_deep", "airbench", "resnet18", "densenet121"])
def test_every_shape_equals_that_of_a_real_forward_pass(name: str) -> None:
    net = nets.create(name, image_size=32).eval()
    real: list[tuple[int, ...]] = []
    leaves = [m for m in net.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    for leaf in leaves:
        leaf.register_forward_hook(lambda _m, _i, out: real.append(tuple(out.shape[1:])))
    net(torch.zeros(1, 3, 32, 32))
    assert [layer.output for layer in describe(name, image_size=32)] == real
    assert sum(layer.parameters for layer in describe(name, image_size=32)) == sum(
        p.numel() for p in net.parameters()
    )


def test_layer_math_of_the_slide() -> None:
    layers = {layer.name: layer for layer in describe("net")}
    shapes = [layers[n].output for n in ("conv1", "pool1", "conv2", "pool2", "fc1", "fc2")]
    assert shapes == [(16, 32, 32), (16, 16, 16), (8, 16, 16), (8, 8, 8), (32,), (10,)]
    assert [layers[n].parameters for n in ("conv1", "conv2", "fc1", "fc2")] == [
        448,
        1160,
        16416,
        330,
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        ("net", {}, 0.75),
        ("net_res_deep", {"n_blocks": 3}, 8.0),
        ("net_res_deep", {}, 24.5),
        ("airbench", {"widths": (16, 32, 64)}, 6.8),
        ("airbench", {}, 19.9),
    ],
)
def test_multiply_adds_are_the_published_ones(
    name: str, arguments: dict[str, object], millions: float
) -> None:
    total = sum(layer.multiply_adds for layer in describe(name, **arguments))
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


def test_shared_parameters_are_counted_once() -> None:
    layers = describe("net_res_deep", shared_blocks=True)
    assert sum(layer.parameters for layer in layers) == 76_074
    assert sum("conv" in layer.name and "resblocks" in layer.name for layer in layers) == 10


def test_hooks_are_removed_again() -> None:
    net = nets.create("net").to("meta")
    assert len(trace_layers(net, (3, 32, 32))) == len(trace_layers(net, (3, 32, 32)))


def test_the_command_prints_the_sums(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["describe", "net_res_deep", "--set", "n_blocks=3"]
    monkeypatch.setattr(sys, "argv", ["convoy-train", *arguments])
    main()
    assert "94,634" in capsys.readouterr().out
