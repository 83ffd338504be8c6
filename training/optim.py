"""Optimisers, penalties and averages of weights, as a recipe names them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.muon import Muon
from training.recipe import Recipe

_LOOKAHEAD_STEPS = 5
_LOOKAHEAD_SHARE = 0.5


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Makes the optimiser, with the parameters grouped by decay and by rate.

    Each group carries `peak_lr`, which the schedule scales. Parameters of one dimension (biases,
    norms) are decayed only where `decay_all` says so, the kernels that `muon` moves never.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norm_biases = {id(m.bias) for m in net.modules() if isinstance(m, norms)}
    muon = recipe.optimizer == "muon"
    decay = recipe.weight_decay if recipe.decay_all else 0.0
    factor = recipe.norm_bias_lr_factor
    weights = _group(recipe.lr, recipe.weight_decay, recipe.momentum)
    plain = _group(recipe.lr, decay, recipe.momentum)
    fast = _group(recipe.lr * factor, decay / factor, recipe.momentum)
    kernels = _group(recipe.muon_lr, 0.0, recipe.muon_momentum, orthogonal=True)
    for parameter in (p for p in net.parameters() if p.requires_grad):
        if id(parameter) in norm_biases:
            group = fast
        elif parameter.ndim == 1:
            group = plain
        else:
            group = kernels if muon and parameter.ndim == 4 else weights
        group["params"].append(parameter)
    groups = [group for group in (weights, plain, fast, kernels) if group["params"]]
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr)
        case "sgd":
            momentum = recipe.momentum
            return torch.optim.SGD(groups, recipe.lr, momentum, nesterov=momentum > 0)
        case "muon":
            return Muon(groups)


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
    """l1 * sum(abs(p)) + l2 * sum(p ** 2) over the parameters that weight decay would touch.

    The slide "Keeping the parameters in check". The second term has the gradient 2 * l2 * p, so
    for plain SGD it is weight_decay = 2 * l2, and not l2 as the slide suggests.
    """
    chosen = [p for p in net.parameters() if p.requires_grad and (p.ndim > 1 or recipe.decay_all)]
    total = chosen[0].new_zeros(())
    if recipe.l1:
        total = total + recipe.l1 * sum(p.abs().sum() for p in chosen)
    if recipe.l2:
        total = total + recipe.l2 * sum(p.square().sum() for p in chosen)
    return total


class Lookahead:
    """Slow weights that follow the trained ones every five steps, and pull them back.

    Source: Zhang et al. (2019), arXiv 1907.08610. The buffers are left alone.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._slow = [p.detach().clone() for p in net.parameters()]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Call after each step of the optimiser."""
        self._steps += 1
        if self._steps % _LOOKAHEAD_STEPS == 0:
            for slow, fast in zip(self._slow, self._net.parameters(), strict=True):
                slow.lerp_(fast, _LOOKAHEAD_SHARE)
                fast.copy_(slow)

    @property
    def net(self) -> nn.Module:
        """What is to be evaluated and kept."""
        return self._net

    def state_dict(self) -> dict[str, object]:
        """What resuming needs."""
        return {"slow": self._slow, "steps": self._steps}

    def load_state_dict(self, state: dict[str, list[Tensor] | int]) -> None:
        """Takes back what `state_dict` gave."""
        slow, steps = state["slow"], state["steps"]
        if isinstance(slow, list) and isinstance(steps, int):
            self._slow, self._steps = [p.clone() for p in slow], steps


class Ema:
    """Exponential moving average of weights and buffers, evaluated in place of the net."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._trained = net
        self._average = AveragedModel(
            net,
            multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
            use_buffers=True,
        )

    def update(self) -> None:
        """Call after each step of the optimiser."""
        self._average.update_parameters(self._trained)

    @property
    def net(self) -> nn.Module:
        """What is to be evaluated and kept."""
        return self._average.module

    def state_dict(self) -> dict[str, object]:
        """What resuming needs."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        self._average.load_state_dict(state)


def make_average(net: nn.Module, recipe: Recipe) -> Lookahead | Ema | None:
    """The average that the recipe names; None trains and keeps the plain weights."""
    match recipe.average:
        case "lookahead":
            return Lookahead(net)
        case "ema":
            return Ema(net, recipe.ema_decay)
        case "none":
            return None
