import subprocess
import sys

import pytest
import torch
from torch import nn

from convoy.training import nets
from convoy.training.errors import NetError


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("net", {}, 18_354),
        ("net_res_deep", {}, 159_594),
        ("net_res_deep", {"n_blocks": 3}, 66_794 + 3 * 9_280),
        ("net_res_deep", {"n_blocks": 100}, 66_794 + 100 * 9_280),
        ("net_res_deep", {"shared_blocks": True}, 76_074),
        ("net_res_deep", {"shared_blocks": True, "n_blocks": 3}, 76_074),
        ("airbench", {}, 295_096),
        ("airbench", {"widths": (16, 32, 64)}, 76_280),
        # 8 filters of 12 weights, their biases and what the next kernels make of them.
        ("airbench", {"whitening_filters": 16}, 295_096 - 8 * (12 + 1) - 32 * 8 * 9),
        ("airbench", {"whitening_bias": False}, 295_096 - 24),
        ("resnet18", {"small_stem": True}, 11_173_962),
    ],
)
def test_parameter_counts_of_the_lecture_and_the_literature(
    name: str, arguments: dict[str, object], expected: int
) -> None:
    assert parameters(nets.create(name, **arguments)) == expected


def test_blocks_are_distinct_unless_sharing_is_asked_for() -> None:
    for shared, distinct in ((False, 4), (True, 1)):
        net = nets.create("net_res_deep", n_blocks=4, shared_blocks=shared)
        norms = {id(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(norms) == distinct


@pytest.mark.parametrize("name", ["net", "net_res_deep"])
@pytest.mark.parametrize("size_px", [16, 28, 48, 64])
def test_an_image_of_another_size_is_an_error_and_not_another_batch(
    name: str, size_px: int
) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nets.create(name)(torch.zeros(4, 3, size_px, size_px))


@pytest.mark.parametrize("name", ["net", "net_res_deep", "airbench"])
def test_channels_last_gives_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    net = nets.create(name, n_classes=7).eval()
    images = torch.randn(3, 3, 32, 32)
    expected = net(images)
    answer = net.to(memory_format=torch.channels_last)(
        images.contiguous(memory_format=torch.channels_last)
    )
    assert answer.shape == (3, 7)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["net", "net_res_deep"])
@pytest.mark.parametrize("downsample", ["max", "average", "stride"])
def test_every_downsampling_quarters_the_image(name: str, downsample: str) -> None:
    net = nets.create(name, downsample=downsample, image_size=28)
    assert net(torch.zeros(2, 3, 28, 28)).shape == (2, 10)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    net = nets.create("net", dropout=0.5)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_residual_blocks_start_as_in_the_book() -> None:
    net = nets.create("net_res_deep", n_blocks=2)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.all(norm.weight == 0.5)
        assert torch.all(norm.bias == 0)


def test_whitened_patches_are_uncorrelated() -> None:
    torch.manual_seed(0)
    net = nets.create("airbench")
    smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 36, 36), 5, stride=1)
    net.whiten(smooth, eps=0.0)
    answers = net.whitening(smooth) - net.whitening.bias[:, None, None]
    rows = answers[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(12), atol=1e-3, rtol=0)
    fewer = nets.create("airbench", whitening_filters=16)
    fewer.whiten(smooth, eps=0.0)
    strongest = net.whitening.weight[:8]
    assert torch.equal(fewer.whitening.weight, torch.cat((strongest, -strongest)))
    patches = nn.functional.unfold(smooth, 2).transpose(1, 2).reshape(-1, 12)
    # Whitening divides by the root of a direction's variance: the strongest have the least norm.
    lengths = net.whitening.weight[:12].flatten(1).norm(dim=1)
    assert torch.equal(lengths, lengths.sort().values)
    assert lengths[0] ** -2 == pytest.approx(
        torch.linalg.norm(patches, 2).item() ** 2 / len(patches), rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet81", {}, "net_res_deep"),
        ("net", {"color": 3}, "color"),
        ("net", {"image_size": 30}, "multiple of 4"),
        ("airbench", {"whitening_filters": 15}, "whitening_filters: expected an even number"),
        ("net", {"downsample": "mean"}, "downsample: expected one of"),
        ("vgg11", {"small_stem": True}, "expected one of ResNet"),
    ],
)
def test_a_wrong_name_or_argument_is_named(
    name: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(NetError, match=message):
        nets.create(name, **arguments)


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "mobilenet_v3_small"])
def test_torchvisions_classifiers_have_a_head_for_our_classes(name: str) -> None:
    with torch.device("meta"):
        net = nets.create(name, n_classes=7)
        head = net.get_submodule(nets.head_of(net))
        assert isinstance(head, nn.Linear)
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, head.out_features) == (2, 7)


@pytest.mark.slow
def test_a_checkpoint_is_read_without_torchvision() -> None:
    """Its import takes seconds, which every export of one of our own nets would pay."""
    code = "import sys, convoy.training.checkpoints, convoy.training.data\n"
    code += "print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_nets_with_auxiliary_heads_give_logits_in_training_too(name: str) -> None:
    with torch.device("meta"):
        net = nets.create(name, n_classes=7)
        for training in (True, False):
            assert net.train(training)(torch.zeros(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize(
    "name",
    ["densenet121", "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5", "mobilenet_v2"],
)
def test_a_small_stem_keeps_the_size_of_small_images(name: str) -> None:
    net, small = (nets.create(name, n_classes=3, small_stem=stem) for stem in (False, True))
    shapes = []
    for each in (net, small):
        convs = [m for m in each.modules() if isinstance(m, nn.Conv2d)]
        convs[0].register_forward_hook(lambda _, __, out: shapes.append(out.shape[-1]))
        each.eval()(torch.zeros(2, 3, 32, 32))
    assert shapes == [16, 32]
