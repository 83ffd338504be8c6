"""The net as it is served: from pixels to logits and calibrated probabilities.

N images, H x W pixels, K classes.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

INPUT_NAME = "image"

Images = NDArray[np.uint8]
"""Images `[N, H, W, 3]`, RGB."""


class Outputs(NamedTuple):
    """What a model says about N images; the field names are those of the served outputs."""

    logits: NDArray[np.float32]  # [N, K]
    probabilities: NDArray[np.float32]  # [N, K]


Run = Callable[[Images], Outputs]
"""A loaded artefact, whatever its format."""


class Servable(nn.Module):
    """Wraps a net so that whoever calls it knows neither mean, std nor temperature.

    (pixel / 255 - mean) / std is folded into one scale and one shift, which stay float32 whatever
    the precision of the net; probabilities = softmax(logits / temperature) (Guo et al., 2017, "On
    Calibration of Modern Neural Networks").
    """

    dtype: torch.dtype
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        channels = (1, len(mean), 1, 1)
        mean_, std_ = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        # A copy where it is converted, since to() would change the caller's net.
        self.net = net if dtype == torch.float32 else copy.deepcopy(net).to(dtype)
        self.dtype = dtype
        self.temperature = temperature
        self.register_buffer("scale", (1 / (255 * std_)).float().reshape(channels))
        self.register_buffer("shift", (-mean_ / std_).float().reshape(channels))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images `[N, H, W, 3]` uint8 to logits and probabilities, both `[N, K]` float32."""
        # Without contiguous() the ONNX exporter writes the net's pooling as shape arithmetic.
        pixels = image.permute(0, 3, 1, 2).contiguous().float()  # [N, 3, H, W] float32
        pixels = (pixels * self.scale + self.shift).to(self.dtype)
        logits = self.net(pixels).float()  # [N, K]
        return logits, torch.softmax(logits / self.temperature, dim=1)
