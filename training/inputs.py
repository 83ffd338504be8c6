"""Pixels in memory to what a net takes: the same arithmetic in training and evaluation."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data import ImageSet

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Normalization:
    """x = (pixel / 255 - mean) / std, per channel."""

    mean: Triple
    std: Triple

    def apply(self, images: Tensor) -> Tensor:
        """Maps `[N, H, W, 3]` uint8 to `[N, 3, H, W]` float32, channels last in memory."""
        mean = torch.tensor(self.mean, device=images.device)
        std = torch.tensor(self.std, device=images.device)
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def measure(images: ImageSet) -> Normalization:
    """Mean and deviation per channel over every pixel of the set, for pixels in 0..1.

    The deviation is that of the pixels, not the mean of the images' own deviations, which the
    lecture prints.
    """
    counts = [np.bincount(images.images[..., c].ravel(), minlength=256) for c in range(3)]
    levels = np.arange(256) / 255
    mean = [float(np.average(levels, weights=count)) for count in counts]
    variance = [
        float(np.average((levels - m) ** 2, weights=count))
        for m, count in zip(mean, counts, strict=True)
    ]
    # A channel of one value has no scale to remove.
    std = [value**0.5 or 1.0 for value in variance]
    return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def to_device(images: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """The set as one uint8 tensor `[N, H, W, 3]` and its labels `[N]` int64, on the device."""
    return torch.from_numpy(images.images).to(device), torch.from_numpy(images.labels).to(device)
