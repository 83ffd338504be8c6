"""The lecture's fixed filters, as convolutions with given weights.

`nn.Conv2d` and `cv2.filter2D` both correlate: they do not flip the kernel. On uint8 images
`cv2.filter2D(ddepth=-1)` differs from the convolution in three ways: OpenCV reflects the border
without repeating the edge (reflect-101) instead of padding with zeros, rounds to integers, and
saturates to 0..255. On float images with `BORDER_CONSTANT` both agree.
"""

import torch
from torch import Tensor, nn

from convoy.training.errors import NetError

KERNELS = {
    "mean": ((1 / 9, 1 / 9, 1 / 9), (1 / 9, 1 / 9, 1 / 9), (1 / 9, 1 / 9, 1 / 9)),
    "vertical": ((0.0, 3 / 9, 0.0), (0.0, 3 / 9, 0.0), (0.0, 3 / 9, 0.0)),
    # A mild sharpening by the diagonal pixels; the usual kernel subtracts the four adjacent ones.
    "sharpen": ((-1 / 9, 0.0, -1 / 9), (0.0, 13 / 9, 0.0), (-1 / 9, 0.0, -1 / 9)),
}
"""Slide "Let's implement this with Python". Each kernel sums to 1 and so keeps the brightness."""


def make_filter(name: str, channels: int = 1, padded: bool = True) -> nn.Conv2d:
    """Return a convolution `[N, C, H, W]` to `[N, C, H, W]` that filters each channel separately.

    Args:
        name: One of `KERNELS`.
        channels: 1 for gray, 3 for RGB.
        padded: Pad with zeros to keep the size; otherwise height and width shrink by 2.

    Raises:
        NetError: The kernel is unknown.
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
    """Filter an image `[H, W]` or `[H, W, C]` of any number type; return float32 of that layout.

    Raises:
        NetError: The kernel is unknown.
    """
    gray = image.ndim == 2
    planes = image.float()[None] if gray else image.float().permute(2, 0, 1)  # [C, H, W]
    out: Tensor = make_filter(name, len(planes), padded)(planes[None])[0]
    return out[0] if gray else out.permute(1, 2, 0)
