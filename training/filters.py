"""The lecture's fixed filters, applied by a convolution whose weights are set by hand.

`nn.Conv2d` correlates: neither it nor `cv2.filter2D` flips the kernel. The lecture's call
`cv2.filter2D(ddepth=-1)` on uint8 still differs from its convolution in three ways: OpenCV reflects
the border without repeating the edge (reflect-101) where the convolution pads with zeros, rounds to
integers, and saturates to 0..255. On float images with `BORDER_CONSTANT` both agree.
"""

import torch
from torch import Tensor, nn

from training.errors import NetError

KERNELS = {
    "mean": ((1 / 9, 1 / 9, 1 / 9), (1 / 9, 1 / 9, 1 / 9), (1 / 9, 1 / 9, 1 / 9)),
    "vertical": ((0.0, 3 / 9, 0.0), (0.0, 3 / 9, 0.0), (0.0, 3 / 9, 0.0)),
    # A mild sharpening by the diagonal neighbours; the usual one subtracts the four adjacent ones.
    "sharpen": ((-1 / 9, 0.0, -1 / 9), (0.0, 13 / 9, 0.0), (-1 / 9, 0.0, -1 / 9)),
}
"""Slide "Let's implement this with Python": each sums to 1, so brightness is kept."""


def make_filter(name: str, channels: int = 1, padded: bool = True) -> nn.Conv2d:
    """Makes the convolution `[N, C, H, W]` to `[N, C, H, W]`, each channel filtered by itself.

    Args:
        name: One of `KERNELS`.
        channels: 1 for grey, 3 for RGB.
        padded: Pad with zeros to keep the size; otherwise height and width shrink by 2.

    Raises:
        NetError: There is no such kernel.
    """
    if name not in KERNELS:
        raise NetError(f"filter: expected one of {', '.join(KERNELS)}, got {name!r}")
    conv = nn.Conv2d(
        channels, channels, kernel_size=3, padding=int(padded), groups=channels, bias=False
    )
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(KERNELS[name]).expand_as(conv.weight))
    return conv.requires_grad_(False)


def apply_filter(name: str, image: Tensor, padded: bool = True) -> Tensor:
    """Filters an image `[H, W]` or `[H, W, C]` of any number type; returns float32 of that layout.

    Raises:
        NetError: There is no such kernel.
    """
    grey = image.ndim == 2
    planes = image.float()[None] if grey else image.float().permute(2, 0, 1)  # [C, H, W]
    out: Tensor = make_filter(name, len(planes), padded)(planes[None])[0]
    return out[0] if grey else out.permute(1, 2, 0)
