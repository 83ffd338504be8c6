import pytest
import torch
from torch import Tensor, nn

from convoy.training import nets
from convoy.training.cpu_kernels import fastest_format, trains_in_bfloat16
from convoy.training.data import ImageSet
from convoy.training.describe import trace_layers
from convoy.training.loop import Trainer
from convoy.training.normalization import Normalization
from convoy.training.readers import MemoryReader
from convoy.training.recipe import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18", 32, torch.contiguous_format),
        ("resnet18", 64, torch.contiguous_format),
        ("resnet18", 224, torch.channels_last),
        ("mobilenet_v3_small", 64, torch.channels_last),
        ("convnext_tiny", 64, torch.channels_last),
        ("airbench", 32, torch.channels_last),
        ("net_res_deep", 32, torch.channels_last),
    ],
)
def test_dense_convolutions_over_small_maps_get_planes(
    name: str, size: int, expected: torch.memory_format
) -> None:
    net = nets.create(name, image_size=size)
    assert fastest_format(net, size, CPU, bfloat16=False) is expected


def test_gpus_and_bfloat16_get_channels_last() -> None:
    net = nets.create("resnet18", image_size=32)
    assert fastest_format(net, 32, CUDA, bfloat16=False) is torch.channels_last
    assert fastest_format(net, 32, CPU, bfloat16=True) is torch.channels_last


def test_the_choice_leaves_the_net_as_it_is() -> None:
    net = nets.create("resnet18", image_size=32).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fastest_format(net, 32, CPU, bfloat16=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in net.modules())


class Watched(nn.Module):
    """One convolution, over small or large maps; notes the format of what it gets."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride)
        self.planes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.planes.add(images.is_contiguous() and self.convolution.weight.is_contiguous())
        return self.convolution(images).mean((2, 3))


@pytest.mark.parametrize(("stride", "planes"), [(4, True), (1, False)])
def test_training_and_validation_get_the_nets_format(stride: int, planes: bool) -> None:
    pixels = torch.arange(16 * 12 * 12 * 3).view(16, 12, 12, 3).to(torch.uint8)
    reader = MemoryReader(ImageSet(pixels.numpy(), (torch.arange(16) % 4).numpy()), CPU)
    net = Watched(stride)
    recipe = Recipe(batch_size=8, image_size=12, flip="random", precision="float32")
    trainer = Trainer(net, recipe, Normalization((0.5,) * 3, (0.25,) * 3), reader, reader)
    net.planes.clear()
    trainer.run_epoch(lambda: None)
    assert net.planes == {planes}


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("airbench", 28, True),
        ("net_res_deep", 8, True),
        ("resnet18", 32, True),
        ("resnet18", 16, False),
        ("vit_b_16", 32, True),
        ("mobilenet_v3_small", 32, True),
        ("mobilenet_v3_small", 8, False),
    ],
)
def test_maps_smaller_than_a_stride_rule_bfloat16_out(name: str, size: int, expected: bool) -> None:
    assert trains_in_bfloat16(nets.create(name, image_size=size), size) is expected


def gradient(side: int, stride: int, kernel: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    images = torch.randn(16, 64, side, side)
    convolution = nn.Conv2d(64, 64, kernel, stride, kernel // 2)
    # Memory that is not written holds what was in it before.
    stale = [torch.full((1 << 16,), torch.nan) for _ in range(8)]
    del stale
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        convolution(images).float().square().sum().backward()
    return convolution.weight.grad


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 2)])
def test_other_gradients_in_bfloat16_are_those_of_float32(
    side: int, stride: int, kernel: int
) -> None:
    wanted, got = (gradient(side, stride, kernel, t) for t in (torch.float32, torch.bfloat16))
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


class SamePadded(nn.Conv2d):
    """Pads by its input's size, as nets ported from TensorFlow do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(images, (1, 1, 1, 1)))


@pytest.mark.parametrize("kind", ["derived", "parametrized"])
def test_unusual_convolutions_are_traced(kind: str) -> None:
    convolution = SamePadded(3, 4, 3) if kind == "derived" else nn.Conv2d(3, 4, 3, padding=1)
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(convolution)
    layers = trace_layers(nn.Sequential(convolution), (3, 8, 8), (nn.Conv2d, nn.Linear))
    assert [(layer.input, layer.output) for layer in layers] == [((3, 8, 8), (4, 8, 8))]
