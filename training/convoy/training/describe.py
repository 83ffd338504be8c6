"""A net layer by layer: the lecture's slide "Layer math" for any net."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convoy.training import nets

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of one module, for a single image.

    Attributes:
        name: Of the module in the net, e.g. resblocks.0.conv.
        kind: Its class.
        output: Shape without the batch axis.
        parameters: Its own; 0 if the module was called before and shares them.
        multiply_adds: Of a convolution or linear layer; 0 for other layers.
    """

    name: str
    kind: str
    output: Shape
    parameters: int
    multiply_adds: int


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """floor((W + 2 P - D (K - 1) - 1) / S) + 1, which the slide gives without floor and dilation.

    Source: Dumoulin and Visin (2016), "A guide to convolution arithmetic", arXiv 1603.07285.
    """
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(module: nn.Module, shape: Shape) -> Shape | None:
    """Return a layer's output shape `[C, H, W]` or `[F]` for `shape`; None without a formula."""
    match module:
        case nn.Conv2d() if not isinstance(module.padding, str):
            dilation, channels = module.dilation, module.out_channels
        case nn.MaxPool2d() if not module.ceil_mode:
            dilation, channels = _pair(module.dilation), shape[0]
        case nn.AvgPool2d() if not module.ceil_mode:
            dilation, channels = (1, 1), shape[0]
        case nn.Linear():
            return (*shape[:-1], module.out_features)
        case _:
            return None
    kernel, stride, padding = (
        _pair(value) for value in (module.kernel_size, module.stride, module.padding)
    )
    sides = (
        output_size(shape[1 + axis], kernel[axis], stride[axis], padding[axis], dilation[axis])
        for axis in (0, 1)
    )
    return (channels, *sides)


def describe(name: str, **arguments: object) -> list[Layer]:
    """List the layers of `nets.create(name, **arguments)` in the order of a forward pass.

    Nothing is computed: the pass runs on shapes alone.

    Raises:
        NetError: The name or an argument is invalid.
    """
    net = nets.create(name, **arguments).eval().to("meta")
    size = arguments.get("image_size", 32)
    return trace_layers(net, (3, size, size))  # type: ignore[arg-type]


def trace_layers(net: nn.Module, shape: Shape) -> list[Layer]:
    """Run one image of `shape` through a net on the meta device and note every leaf module."""
    layers: list[Layer] = []
    seen: set[nn.Module] = set()

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            computed = output_shape(module, tuple(inputs[0].shape[1:])) or tuple(output.shape[1:])
            own = 0 if module in seen else sum(p.numel() for p in module.parameters())
            seen.add(module)
            work = multiply_adds(module, computed)
            layers.append(Layer(name, type(module).__name__, computed, own, work))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in net.named_modules()
        if not list(module.children()) and not isinstance(module, nn.Identity)
    ]
    try:
        net(torch.empty(1, *shape, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return layers


def multiply_adds(module: nn.Module, output: Shape) -> int:
    """Return the multiply-adds of a convolution or linear layer for one output; else 0."""
    elements = int(torch.Size(output).numel())
    if isinstance(module, nn.Conv2d):
        return elements * module.weight[0].numel()
    return elements * module.in_features if isinstance(module, nn.Linear) else 0


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
