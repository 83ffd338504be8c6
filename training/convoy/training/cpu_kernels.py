"""What the convolutions of oneDNN, PyTorch's library for CPUs, ask of a training.

That is the order of weights and images in memory, and the precision.
"""

import torch
from torch import nn

from convoy.training.describe import Layer, trace_layers

_SMALL_PX = 4
_SMALL_SHARE = 1 / 3


def fastest_format(
    net: nn.Module, image_size: int, device: torch.device, *, bfloat16: bool
) -> torch.memory_format:
    """Return the memory format in which a net presumably trains fastest.

    That is channels last, except for convolutions over small maps in float32 on a CPU: there
    oneDNN's kernels for planes take half to four fifths of the time. The choice depends on shapes
    alone, because measured times would break the rule that equal seeds give equal weights.

    Args:
        net: On the device.
        image_size: Height and width of the images in pixels.
        device: Of the training.
        bfloat16: The training step is in bfloat16.
    """
    if device.type != "cpu" or bfloat16:
        return torch.channels_last
    small = _share_on_small_maps(net, image_size) > _SMALL_SHARE
    return torch.contiguous_format if small else torch.channels_last


def trains_in_bfloat16(net: nn.Module, image_size: int) -> bool:
    """Tell whether oneDNN computes a net's gradients in bfloat16 for images of this size or more.

    Where a convolution's map is smaller than its stride, the gradient of the kernel contains memory
    that was never written: huge numbers or NaN (torch 2.15 on a processor with AMX).
    """
    return not any(
        isinstance(layer.module, nn.Conv2d)
        and any(
            side < stride for side, stride in zip(layer.input[1:], layer.module.stride, strict=True)
        )
        for layer in _traced(net, image_size)
    )


def _traced(net: nn.Module, image_size: int) -> list[Layer]:
    return trace_layers(net, (3, image_size, image_size), (nn.Conv2d, nn.Linear))


def _share_on_small_maps(net: nn.Module, image_size: int) -> float:
    """Return the share of the multiply-adds in dense convolutions with outputs of few pixels.

    1 x 1 convolutions and those of channel groups do not count as dense: channels last is no slower
    for the former and up to three times as fast for nets of the latter.
    """
    works = [
        (layer.multiply_adds, _is_dense(layer.module) and _is_small(layer))
        for layer in _traced(net, image_size)
    ]
    total = sum(work for work, _ in works)
    return sum(work for work, small in works if small) / total if total else 0.0


def _is_small(layer: Layer) -> bool:
    return max(layer.output[1:]) <= _SMALL_PX


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and max(module.weight.shape[2:]) > 1
