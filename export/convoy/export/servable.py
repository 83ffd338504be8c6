"""The served net: from pixels to logits and calibrated probabilities.

N images, H x W pixels, K classes.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convoy.export.formats import LUMA, ChannelOrder, OutputKind

INPUT_NAME = "image"
LEAST_PROBABILITY = {OutputKind.PROBABILITIES: 1e-4, OutputKind.SIGMOID: 1e-3}
"""Smaller probabilities are raised to it before the logarithm.

Runtimes round small probabilities differently, and the logarithm would magnify this. The
probabilities themselves are not changed.
"""

Images = NDArray[np.uint8]
"""Images `[N, H, W, 3]`, RGB."""


class Outputs(NamedTuple):
    """The outputs for N images; the field names are those of the served outputs."""

    logits: NDArray[np.float32]  # [N, K]
    probabilities: NDArray[np.float32]  # [N, K]


Run = Callable[[Images], Outputs]
"""A loaded artifact, whatever its format."""


def run_module(module: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Run:
    """Return a function that runs a loaded torch module on this process's CPU."""

    def run(images: Images) -> Outputs:
        with torch.inference_mode():
            logits, probabilities = module(torch.from_numpy(images))
        return Outputs(logits.numpy(), probabilities.numpy())

    return run


class Servable(nn.Module):
    """Wraps a net so that callers need to know neither mean, std nor temperature.

    (pixel / 255 - mean) / std is folded into one scale and one shift, which stay float32 for
    every precision of the net; probabilities = softmax(logits / temperature) (Guo et al., 2017, "On
    Calibration of Modern Neural Networks"). If the net's output is already a probability, it is not
    changed, and the logits are its logarithm.
    """

    dtype: torch.dtype
    output: str
    channel_order: str
    luma: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(  # noqa: PLR0917 -- TorchScript reads no keyword-only parameters
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float,
        dtype: torch.dtype = torch.float32,
        output: OutputKind = OutputKind.LOGITS,
        channel_order: ChannelOrder = ChannelOrder.RGB,
    ) -> None:
        super().__init__()
        channels = (1, len(mean), 1, 1)
        mean_, std_ = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        # Copy it before a conversion, because to() would change the caller's net.
        self.net = net if dtype == torch.float32 else copy.deepcopy(net).to(dtype)
        self.dtype = dtype
        # Strings instead of enums, because TorchScript compiles forward.
        self.output = output.value
        self.channel_order = channel_order.value
        self.least_probability = LEAST_PROBABILITY.get(output, 0.0)
        self.temperature = temperature
        self.register_buffer("luma", torch.tensor(LUMA).reshape(channels))
        self.register_buffer("scale", (1 / (255 * std_)).float().reshape(channels))
        self.register_buffer("shift", (-mean_ / std_).float().reshape(channels))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map images `[N, H, W, 3]` uint8 to logits and probabilities, both `[N, K]` float32."""
        # Without contiguous() the ONNX exporter writes the net's pooling as shape arithmetic.
        pixels = image.permute(0, 3, 1, 2).contiguous().float()  # [N, 3, H, W] float32
        pixels = pixels * self.scale + self.shift
        if self.channel_order == "gray":
            # The weights sum to 1 and all channels have one mean and std: the order is free.
            pixels = (pixels * self.luma).sum(1, keepdim=True)
        pixels = pixels.to(self.dtype)
        if self.channel_order == "bgr":
            pixels = pixels.flip(1)
        scores = self.net(pixels).float().flatten(1)  # [N, K]
        if self.output != "logits":
            # Near 1 the log-odds of a sigmoid lose all digits; log-probabilities lose none.
            return torch.log(scores.clamp(min=self.least_probability)), scores
        return scores, torch.softmax(scores / self.temperature, dim=1)
