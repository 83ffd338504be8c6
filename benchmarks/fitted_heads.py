"""Nets with random weights that classify like trained ones: their last layer is fitted.

The logits of random weights hardly differ between images, so that any rounding changes the class.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convoy.training.checkpoints import DataDescription
from convoy.training.data import load_data

BATCH_SIZE = 64
LOGIT = 5.0
"""Of the label; the others are 0. Softmax makes 0.94 of it, as trained with smoothed labels."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
LEAST_STD = 0.01
"""Features that vary less on digits get no larger weights: on noise they may vary more."""
NORM_BIAS = 1.0
"""With a bias of 0, a dozen random layers with ReLU tell nothing about the image."""


def fit(net: nn.Module, described: DataDescription) -> None:
    """Fit the last layer to labeled digits, after batch norms took their statistics from them.

    The images of the proof are among them, so that its margins are those of a net that is sure.
    """
    scale_branches(net)
    data = load_data("digits", described.preprocessing)
    images = np.concatenate([data.train.images, data.valid.images])  # [N, H, W, 3] uint8
    labels = torch.from_numpy(np.concatenate([data.train.labels, data.valid.labels]))
    mean, std = (
        torch.tensor(values).reshape(3, 1, 1) for values in (described.mean, described.std)
    )
    batches = [
        (part.permute(0, 3, 1, 2) / 255 - mean) / std
        for part in torch.from_numpy(images).split(BATCH_SIZE)
    ]
    with torch.inference_mode():
        set_norms(net, batches)
        head = last_layer(net, batches[0])
        features: list[Tensor] = []
        hook = head.register_forward_pre_hook(
            # Of a 1 x 1 convolution, [N, F, H, W], the mean over places.
            lambda _, inputs: features.append(inputs[0].reshape(*inputs[0].shape[:2], -1).mean(2))
        )
        for batch in batches:
            net(batch)
        hook.remove()
        targets = LOGIT * nn.functional.one_hot(labels, len(data.classes)).double()
        set_head(head, torch.cat(features).double(), targets)


def set_norms(net: nn.Module, batches: Sequence[Tensor]) -> None:
    """Give batch norms statistics, and nets without any norm convolutions of unit variance."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches if norms else ():
        net(batch)
    net.eval()
    if any(isinstance(module, _BatchNorm | nn.LayerNorm) for module in net.modules()):
        return
    hooks = [
        module.register_forward_hook(standardize)
        for module in net.modules()
        if isinstance(module, nn.Conv2d)
    ]
    net(batches[0])
    for hook in hooks:
        hook.remove()


def standardize(layer: nn.Conv2d, _: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    """Change a convolution so that each channel of its outputs `[N, C, H, W]` has unit variance."""
    std, mean = torch.std_mean(outputs, dim=(0, 2, 3))
    layer.weight.div_(std.reshape(-1, 1, 1, 1))
    layer.bias.sub_(mean).div_(std).add_(NORM_BIAS)
    each = (1, -1, 1, 1)
    return (outputs - mean.reshape(each)) / std.reshape(each) + NORM_BIAS


def scale_branches(net: nn.Module) -> None:
    """Let residual branches count, which start at or near zero and grow in training."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, NORM_BIAS)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for name, parameter in net.named_parameters():
        if name.endswith(("gamma", "layer_scale")):
            nn.init.ones_(parameter)
        elif name.endswith("in_proj_weight"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def last_layer(net: nn.Module, batch: Tensor) -> nn.Linear | nn.Conv2d:
    called: list[nn.Linear | nn.Conv2d] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in net.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    net(batch[:2])
    for hook in hooks:
        hook.remove()
    return called[-1]


def set_head(head: nn.Linear | nn.Conv2d, features: Tensor, targets: Tensor) -> None:
    """Fit a layer by ridge regression.

    Args:
        head: The layer.
        features: Its inputs `[N, F]` float64.
        targets: Logits `[N, K]` float64.
    """
    center, scale = features.mean(0), features.std(0).clamp_min(LEAST_STD)
    x = (features - center) / scale
    fitted, held_out = slice(0, None, 2), slice(1, None, 2)

    def accuracy(ridge: float) -> float:
        weight, bias = ridge_regression(x[fitted], targets[fitted], ridge)
        right = (x[held_out] @ weight + bias).argmax(1) == targets[held_out].argmax(1)
        return float(right.double().mean())

    accuracies = {ridge: accuracy(ridge) for ridge in RIDGES}
    # Of the good ones the largest: it gives the smallest weights.
    good = [ridge for ridge in RIDGES if accuracies[ridge] >= max(accuracies.values()) - 0.01]
    weight, bias = ridge_regression(x, targets, max(good))  # [F, K], [K]
    scaled = weight.T / scale
    head.weight.copy_(scaled.reshape(head.weight.shape))
    head.bias.copy_(bias - scaled @ center)


def ridge_regression(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weights `[F, K]` and bias `[K]`."""
    center = y.mean(0)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ (y - center)), center
