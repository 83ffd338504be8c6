"""Nets by name: normalised float32 images `[N, 3, H, W]` to logits `[N, K]`."""

from collections.abc import Callable

from torch import nn

from training.errors import NetError
from training.nets import torchvision_nets
from training.nets.airbench import AirbenchNet
from training.nets.lecture import Net, NetResDeep

_OWN: dict[str, Callable[..., nn.Module]] = {
    "net": Net,
    "net_res_deep": NetResDeep,
    "airbench": AirbenchNet,
}


def names() -> tuple[str, ...]:
    """Every name that `create` knows: ours first, then torchvision's classifiers."""
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
    if name not in names():
        known = f"{', '.join(_OWN)} or a torchvision classifier such as resnet18"
        raise NetError(f"model: expected {known}, got {name!r}")
    try:
        if name in _OWN:
            return _OWN[name](**arguments)
        return torchvision_nets.create(name, **arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise NetError(f"model {name}: {error}") from error
