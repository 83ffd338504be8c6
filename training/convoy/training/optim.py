"""Optimizers, penalties and averages of weights."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convoy.training.recipe import Recipe

_LOOKAHEAD_STEPS = 5
_NUMBERED = re.compile(r"^\d+$|_\d+$")
_LOOKAHEAD_SHARE = 0.5


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov's momentum; groups with `orthogonal` make orthogonal steps.

    A kernel of such a group is seen as a matrix with one row per output channel. It is scaled to a
    fixed norm before each step, and the step is the orthogonal matrix nearest to the momentum.
    Kernels must be followed by a normalization, so that their norm has no effect.

    Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks", as in
    the CIFAR-10 speed run "airbench94_muon".

    Args:
        groups: Each with `params`, `lr`, `momentum`, `weight_decay` and `orthogonal`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step along the gradients."""
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
            update = orthogonalized(update.flatten(1)).view_as(update)
        parameter.add_(update, alpha=-group["lr"])


def orthogonalized(matrix: Tensor, steps: int = 3) -> Tensor:
    """Bring the singular values of `[M, N]` near 1 and keep the singular vectors.

    By the Newton-Schulz iteration with a quintic chosen for speed. Values end between about 0.5 and
    1.5, the smallest ones lower, which works as well for training as exactly 1.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        factor = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    return x.T if tall else x


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create the optimizer, with the parameters grouped by decay and by rate.

    Each group has `peak_lr`, which the schedule scales. Parameters of one dimension (biases,
    norms) decay only with `decay_all`, and the kernels of `muon` never.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norm_biases = {id(m.bias) for m in net.modules() if isinstance(m, norms)}
    muon = recipe.optimizer == "muon"
    decay = recipe.weight_decay if recipe.decay_all else 0.0
    factor = recipe.norm_bias_lr_factor
    depths = layer_depths(net)
    groups: list[dict[str, Any]] = []
    for depth in sorted(set(depths.values())) if recipe.layer_decay < 1 else (0,):
        share = recipe.layer_decay**depth
        weights = _group(recipe.lr * share, recipe.weight_decay, recipe.momentum)
        plain = _group(recipe.lr * share, decay, recipe.momentum)
        fast = _group(recipe.lr * share * factor, decay / factor, recipe.momentum)
        kernels = _group(recipe.muon_lr * share, 0.0, recipe.muon_momentum, orthogonal=True)
        for parameter in (p for p in net.parameters() if p.requires_grad):
            if recipe.layer_decay < 1 and depths[id(parameter)] != depth:
                continue
            if id(parameter) in norm_biases:
                group = fast
            elif parameter.ndim == 1:
                group = plain
            else:
                group = kernels if muon and parameter.ndim == 4 else weights
            group["params"].append(parameter)
        groups += [group for group in (weights, plain, fast, kernels) if group["params"]]
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr)
        case "sgd":
            momentum = recipe.momentum
            return torch.optim.SGD(groups, recipe.lr, momentum, nesterov=momentum > 0)
        case "muon":
            return Muon(groups)


def layer_depths(net: nn.Module) -> dict[int, int]:
    """Return the number of layers between each parameter, by id, and the head.

    A layer is a module, or a numbered part of one: conv1, layer1.0, features.3, blocks.11.
    """
    layers: dict[str, int] = {}
    found: dict[int, int] = {}
    for name, parameter in net.named_parameters():
        parts = name.split(".")[:-1]
        numbered = next((i for i, part in enumerate(parts) if _NUMBERED.search(part)), 0)
        layer = ".".join(parts[: numbered + 1])
        found[id(parameter)] = layers.setdefault(layer, len(layers))
    return {key: len(layers) - 1 - index for key, index in found.items()}


def _group(
    lr: float, weight_decay: float, momentum: float, orthogonal: bool = False
) -> dict[str, Any]:
    return {
        "params": [],
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "orthogonal": orthogonal,
    }


def penalty(net: nn.Module, recipe: Recipe) -> Tensor:
    """l1 * sum(abs(p)) + l2 * sum(p ** 2) over the parameters with weight decay.

    The slide "Keeping the parameters in check". The second term has the gradient 2 * l2 * p, so
    for plain SGD it equals weight_decay = 2 * l2, not l2 as the slide suggests.
    """
    chosen = [p for p in net.parameters() if p.requires_grad and (p.ndim > 1 or recipe.decay_all)]
    total = chosen[0].new_zeros(())
    if recipe.l1:
        total = total + recipe.l1 * sum(p.abs().sum() for p in chosen)
    if recipe.l2:
        total = total + recipe.l2 * sum(p.square().sum() for p in chosen)
    return total


class Lookahead:
    """Lookahead: slow weights that follow the trained ones every five steps and replace them.

    Source: Zhang et al. (2019), arXiv 1907.08610. The buffers do not change.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._slow = [p.detach().clone() for p in net.parameters()]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Update the average; call it after each step of the optimizer."""
        self._steps += 1
        if self._steps % _LOOKAHEAD_STEPS == 0:
            for slow, fast in zip(self._slow, self._net.parameters(), strict=True):
                slow.lerp_(fast, _LOOKAHEAD_SHARE)
                fast.copy_(slow)

    @property
    def net(self) -> nn.Module:
        """The weights to evaluate and save."""
        return self._net

    def state_dict(self) -> dict[str, object]:
        """Return the state for resuming."""
        return {"slow": self._slow, "steps": self._steps}

    def load_state_dict(self, state: dict[str, list[Tensor] | int]) -> None:
        """Restore the result of `state_dict`."""
        slow, steps = state["slow"], state["steps"]
        if isinstance(slow, list) and isinstance(steps, int):
            self._slow, self._steps = [p.clone() for p in slow], steps


class Ema:
    """Exponential moving average of weights and buffers, evaluated instead of the net."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._trained = net
        self._average = AveragedModel(
            net,
            multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
            use_buffers=True,
        )

    def update(self) -> None:
        """Update the average; call it after each step of the optimizer."""
        self._average.update_parameters(self._trained)

    @property
    def net(self) -> nn.Module:
        """The weights to evaluate and save."""
        return self._average.module

    def state_dict(self) -> dict[str, object]:
        """Return the state for resuming."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._average.load_state_dict(state)


def make_average(net: nn.Module, recipe: Recipe) -> Lookahead | Ema | None:
    """Return the recipe's average of the weights; None for plain weights."""
    match recipe.average:
        case "lookahead":
            return Lookahead(net)
        case "ema":
            return Ema(net, recipe.ema_decay)
        case "none":
            return None
