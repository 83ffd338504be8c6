"""Nets by name: normalised float32 images `[N, 3, H, W]` to logits `[N, K]`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from training.errors import NetError
from training.nets.airbench import AirbenchNet
from training.nets.lecture import Net, NetResDeep

_OWN: dict[str, Callable[..., nn.Module]] = {
    "net": Net,
    "net_res_deep": NetResDeep,
    "airbench": AirbenchNet,
}


def names() -> tuple[str, ...]:
    """Every name that `create` knows: ours first, then torchvision's classifiers."""
    from training.nets import torchvision_nets

    return (*_OWN, *torchvision_nets.names())


def create(name: str, **arguments: object) -> nn.Module:
    """Makes a net with fresh weights.

    Args:
        name: One of `names()`.
        **arguments: `n_classes` (default 10), `image_size` in pixels (default 32, torchvision's
            nets 224), and what the net itself takes.

    Raises:
        NetError: The name or an argument is unknown, or the arguments do not fit together.
    """
    builder = _OWN.get(name)
    if builder is None:
        # torchvision takes seconds to import; our own nets do not need it.
        from training.nets import torchvision_nets

        if name not in torchvision_nets.names():
            known = f"{', '.join(_OWN)} or a torchvision classifier such as resnet18"
            raise NetError(f"model: expected {known}, got {name!r}")
        builder = partial(torchvision_nets.create, name)
    try:
        return builder(**arguments)
    except (TypeError, ValueError) as error:
        raise NetError(f"model {name}: {error}") from error


def head_of(net: nn.Module) -> str:
    """The name of the last layer with weights, which gives the logits."""
    return list(net.state_dict())[-1].rpartition(".")[0]


def freeze_backbone(net: nn.Module) -> None:
    """Leaves only the head trainable."""
    net.requires_grad_(False)
    net.get_submodule(head_of(net)).requires_grad_(True)
