"""The optimiser Muon: momentum whose steps on convolution kernels are made orthogonal."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov's momentum; in groups with `orthogonal` set it moves all directions alike.

    There a kernel, seen as a matrix of one row an output channel, is brought to one length before
    each step, and the step is the orthogonal matrix nearest to the momentum. Kernels must be
    followed by a norm, which makes their length meaningless.

    Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks", as in
    the CIFAR-10 speed run "airbench94_muon".

    Args:
        groups: Each with `params`, `lr`, `momentum`, `weight_decay` and `orthogonal`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes one step along the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        momentum = group["momentum"]
        gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        velocity = state.setdefault("velocity", torch.zeros_like(parameter))
        velocity.mul_(momentum).add_(gradient)
        update = gradient.add(velocity, alpha=momentum)
        if group["orthogonal"]:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
            update = orthogonalised(update.flatten(1)).view_as(update)
        parameter.add_(update, alpha=-group["lr"])


def orthogonalised(matrix: Tensor, steps: int = 3) -> Tensor:
    """Brings the singular values of `[M, N]` near 1 and keeps the singular vectors.

    By Newton and Schulz's iteration with a quintic chosen for speed: values end between about 0.5
    and 1.5, the smallest of them lower, which is as good for training as exactly 1.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.T if tall else x
