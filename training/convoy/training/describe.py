"""A net layer by layer: the lecture's slide "Layer math" for any net."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convoy.training import nets
from convoy.training.evaluate import evaluation_mode

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of one module, for a single image.

    Attributes:
        name: Of the module in the net, e.g. resblocks.0.conv.
        module: The module.
        input: Shape of its first argument, without the batch axis.
        output: Shape without the batch axis.
        parameters: Its own; 0 if the module was called before and shares them.
    """

    name: str
    module: nn.Module
    input: Shape
    output: Shape
    parameters: int

    @property
    def kind(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    @property
    def multiply_adds(self) -> int:
        """Of a convolution or linear layer; 0 for other layers."""
        elements = int(torch.Size(self.output).numel())
        if isinstance(self.module, nn.Conv2d):
            return elements * self.module.weight[0].numel()
        return elements * self.module.in_features if isinstance(self.module, nn.Linear) else 0


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """floor((W + 2 P - D (K - 1) - 1) / S) + 1, which the slide gives without floor and dilation.

    Source: Dumoulin and Visin (2016), "A guide to convolution arithmetic", arXiv 1603.07285.
    """
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(module: nn.Module, shape: Shape) -> Shape | None:
    """Return a layer's output shape `[C, H, W]` or `[F]` for `shape`; None without a formula.

    Subclasses of these layers have none, since they may compute something else.
    """
    if type(module) not in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Linear):
        return None
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
    net = nets.create(name, **arguments).to("meta")
    size = arguments.get("image_size", 32)
    return trace_layers(net, (3, size, size))  # type: ignore[arg-type]


def trace_layers(
    net: nn.Module, shape: Shape, kinds: tuple[type[nn.Module], ...] = ()
) -> list[Layer]:
    """Run one image through a net in evaluation mode and note the calls of its layers.

    Args:
        net: On any device; on the meta device nothing is computed.
        shape: Of the image, `[C, H, W]`.
        kinds: The classes of the layers; () takes every module without children.
    """
    layers: list[Layer] = []
    seen: set[nn.Module] = set()

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given = tuple(inputs[0].shape[1:])
            computed = output_shape(module, given) or tuple(output.shape[1:])
            own = 0 if module in seen else sum(p.numel() for p in module.parameters())
            seen.add(module)
            layers.append(Layer(name, module, given, computed, own))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in net.named_modules()
        if (isinstance(module, kinds) if kinds else _is_leaf(module))
    ]
    device = next(net.parameters()).device
    try:
        with evaluation_mode(net):
            net(torch.zeros(1, *shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return layers


def _is_leaf(module: nn.Module) -> bool:
    return not list(module.children()) and not isinstance(module, nn.Identity)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
