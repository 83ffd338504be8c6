"""Normalization of pixels: the same arithmetic in training and evaluation."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from convoy.training.data import Images

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Normalization:
    """x = (pixel / 255 - mean) / std, per channel."""

    mean: Triple
    std: Triple

    def apply(self, images: Tensor) -> Tensor:
        """Map `[N, H, W, 3]` uint8 to `[N, 3, H, W]` float32, channels last in memory."""
        width = images.shape[2]
        mean, std = (_row(images.device, values, width) for values in (self.mean, self.std))
        rows = images.flatten(2).float().div_(255).sub_(mean).div_(std)  # [N, H, W * 3]
        return rows.view(images.shape).permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def _row(device: torch.device, values: Triple, width: int) -> Tensor:
    """Return the values for a row of pixels `[W * 3]`; arithmetic is faster than with `[3]`.

    Cached, because copying them for each batch would wait for the GPU.
    """
    return torch.tensor(values, device=device).repeat(width)


def measure(images: Images) -> Normalization:
    """Return mean and standard deviation per channel over all pixels of the set, in 0..1.

    The deviation is that of the pixels; the lecture prints the mean of the deviations per image.
    """
    pixels_per_image = images.read([0])[0, ..., 0].size
    total, squares = images.measure() / (len(images) * pixels_per_image)
    # A channel with one value has no scale.
    std = [max(0.0, float(v)) ** 0.5 / 255 or 1.0 for v in squares - total**2]
    mean = [float(v) / 255 for v in total]
    return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
