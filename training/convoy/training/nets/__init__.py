"""Nets by name: normalized float32 images `[N, 3, H, W]` to logits `[N, K]`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from convoy.training.errors import NetError
from convoy.training.nets.airbench import AirbenchNet
from convoy.training.nets.factories import (
    TIMM,
    create_by_factory,
    create_by_timm,
    is_factory,
    takes,
)
from convoy.training.nets.lecture import Net, NetResDeep

_OWN: dict[str, Callable[..., nn.Module]] = {
    "net": Net,
    "net_res_deep": NetResDeep,
    "airbench": AirbenchNet,
}


def names() -> tuple[str, ...]:
    """Return all names for `create`: our nets first, then torchvision's classifiers."""
    from convoy.training.nets import torchvision_nets

    return (*_OWN, *torchvision_nets.names())


def create(name: str, **arguments: object) -> nn.Module:
    """Create a net with random weights.

    Args:
        name: One of `names()`, timm:NAME, or a factory in the user's own code, which is run:
            FILE.py:NAME or PACKAGE.MODULE:NAME.
        **arguments: `n_classes` (default 10), `image_size` in pixels (default 32, torchvision's
            nets 224), and the net's own arguments.

    Raises:
        NetError: The name or an argument is unknown, or the arguments do not fit together.
    """
    if name.startswith(TIMM):
        return create_by_timm(name, **arguments)  # type: ignore[arg-type]
    if is_factory(name):
        return create_by_factory(name, **arguments)  # type: ignore[arg-type]
    builder = _OWN.get(name)
    if builder is None:
        # Importing torchvision takes seconds, and our own nets do not need it.
        from convoy.training.nets import torchvision_nets

        if name not in torchvision_nets.names():
            known = f"{', '.join(_OWN)}, a torchvision classifier such as resnet18, timm:NAME or "
            known += "FILE.py:FACTORY"
            raise NetError(f"model: expected {known}, got {name!r}")
        builder = partial(torchvision_nets.create, name)
    try:
        return builder(**arguments)
    except (TypeError, ValueError) as error:
        raise NetError(f"model {name}: {error}") from error


def accepts(name: str, argument: str) -> bool:
    """Return whether `create` passes `n_classes` or `image_size` to the net."""
    return not is_factory(name) or takes(name, argument)


def head_of(net: nn.Module) -> str:
    """Return the name of the last layer with weights, which gives the logits."""
    return list(net.state_dict())[-1].rpartition(".")[0]


def freeze_backbone(net: nn.Module) -> None:
    """Make only the head trainable."""
    net.requires_grad_(False)
    net.get_submodule(head_of(net)).requires_grad_(True)
