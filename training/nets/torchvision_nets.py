"""torchvision's classifiers with a head for our classes."""

from typing import Any

from torch import nn
from torchvision import models


def names() -> tuple[str, ...]:
    """The classifiers of torchvision, e.g. resnet18 or convnext_tiny."""
    found: list[str] = models.list_models(module=models)
    # inception_v3 and googlenet answer with a tuple in training mode.
    return tuple(name for name in found if name not in ("inception_v3", "googlenet"))


def create(
    name: str,
    n_classes: int = 10,
    image_size: int = 224,
    small_stem: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Builds a randomly initialised classifier.

    Args:
        name: One of `names()`.
        n_classes: Outputs of the head.
        image_size: Height and width in pixels; only vision transformers depend on it.
        small_stem: For 32 x 32 pixels, a ResNet's first convolution becomes 3 x 3 with stride 1 and
            its first max-pool is left out (vision issue 1166).
        **arguments: Passed on to torchvision's builder.

    Raises:
        ValueError: `small_stem` with a net that is no ResNet.
        TypeError: torchvision does not know an argument.
    """
    if name.startswith("vit_"):
        arguments["image_size"] = image_size
    net: nn.Module = models.get_model(name, weights=None, num_classes=n_classes, **arguments)
    if small_stem:
        if not isinstance(net, models.ResNet):
            raise ValueError(f"small_stem: expected a ResNet, got {name}")
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net
