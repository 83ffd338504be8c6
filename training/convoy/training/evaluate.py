"""Evaluation of a net on images that it was not trained on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_TEMPERATURE_BOUNDS = (0.05, 20.0)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Logits `[N, K]` and labels `[N]`, on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        """Mean cross entropy per sample, in nats; ln K if all logits are equal."""
        return float(functional.cross_entropy(self.logits.double(), self.labels))

    @property
    def accuracy(self) -> float:
        """Share of the samples whose largest logit belongs to their label, 0 to 1."""
        return int((self.logits.argmax(1) == self.labels).sum()) / len(self.labels)


@contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, then restore the previous modes."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def predict(net: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return logits `[N, K]` of normalized batches `[M, C, H, W]`, on the CPU.

    The net's weights and buffers do not change.
    """
    with evaluation_mode(net):
        logits = torch.cat([net(batch).float().cpu() for batch in batches])
    return logits.clone()


def fit_temperature(evaluation: Evaluation) -> float:
    """Return the T that minimizes the cross entropy of softmax(logits / T).

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks". Use validation data.
    The loss is convex in 1/T; bisection finds the zero of its slope.
    """
    logits = evaluation.logits.double()
    wanted = logits.gather(1, evaluation.labels[:, None]).mean()

    def slope(inverse: float) -> float:
        expected = (torch.softmax(logits * inverse, 1) * logits).sum(1).mean()
        return float(expected - wanted)

    low, high = 1 / _TEMPERATURE_BOUNDS[1], 1 / _TEMPERATURE_BOUNDS[0]
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(1 / (low * high) ** 0.5)
