"""torchvision's classifiers with a head for our classes."""

from typing import Any

from torch import nn
from torchvision import models

_WITH_AUXILIARY_HEADS = ("inception_v3", "googlenet")
# The first convolution and the max-pool after it.
_STEMS = {
    models.ResNet: ("conv1", "maxpool"),
    models.DenseNet: ("features.conv0", "features.pool0"),
    models.ShuffleNetV2: ("conv1.0", "maxpool"),
    models.RegNet: ("stem.0", ""),
    models.MNASNet: ("layers.0", ""),
    models.MobileNetV2: ("features.0.0", ""),
    models.MobileNetV3: ("features.0.0", ""),
    models.EfficientNet: ("features.0.0", ""),
}


def names() -> tuple[str, ...]:
    """Return the classifiers of torchvision, e.g. resnet18 or convnext_tiny."""
    found: list[str] = models.list_models(module=models)
    return tuple(found)


def create(
    name: str,
    n_classes: int = 10,
    image_size: int = 224,
    small_stem: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Create a randomly initialized classifier.

    Args:
        name: One of `names()`.
        n_classes: Outputs of the head.
        image_size: Height and width in pixels; only vision transformers depend on it.
        small_stem: For 32 x 32 pixels, the first convolution becomes 3 x 3 with stride 1 and the
            max-pool after it is removed (vision issue 1166).
        **arguments: Passed to torchvision's builder.

    Raises:
        ValueError: The net does not support `small_stem`.
        TypeError: torchvision does not know an argument.
    """
    if name.startswith("vit_"):
        arguments["image_size"] = image_size
    if name in _WITH_AUXILIARY_HEADS:
        # With auxiliary heads the output in training is a tuple.
        arguments = {"aux_logits": False, "init_weights": False, **arguments}
    net: nn.Module = models.get_model(name, weights=None, num_classes=n_classes, **arguments)
    if small_stem:
        _shrink_stem(net, name)
    return net


def _shrink_stem(net: nn.Module, name: str) -> None:
    stem = next((paths for kind, paths in _STEMS.items() if isinstance(net, kind)), None)
    if stem is None:
        known = ", ".join(kind.__name__ for kind in _STEMS)
        raise ValueError(f"small_stem: expected one of {known}, got {name}")
    first = net.get_submodule(stem[0])
    if not isinstance(first, nn.Conv2d):
        raise ValueError(f"small_stem: expected a convolution at {stem[0]} of {name}")
    small = nn.Conv2d(3, first.out_channels, kernel_size=3, padding=1, bias=first.bias is not None)
    net.set_submodule(stem[0], small)
    if stem[1]:
        net.set_submodule(stem[1], nn.Identity())
