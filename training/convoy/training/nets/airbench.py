"""A small and fast net: frozen whitening, then three pairs of convolutions.

Sources: Jordan (2024), "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498;
Page (2018-2019), "How to Train Your ResNet" (patch whitening).
"""

import torch
from torch import Tensor, nn

_WHITENING_PX = 2
_DIRECTIONS = 3 * _WHITENING_PX**2


class _Block(nn.Module):
    """Two convolutions with batch norm and GELU; the pooling halves the image after the first."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _dirac_conv(in_channels, channels)
        self.norm1 = _norm(channels)
        self.conv2 = _dirac_conv(channels, channels)
        self.norm2 = _norm(channels)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.gelu(self.norm1(self.pool(self.conv1(x))))
        # An annotation instead of cast(), because TorchScript compiles this code.
        normed: Tensor = self.norm2(self.conv2(out))
        return nn.functional.gelu(normed)


def _dirac_conv(in_channels: int, channels: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution whose first channels start as the identity."""
    conv = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:in_channels].data)
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with a frozen scale and fast statistics, for short trainings."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class AirbenchNet(nn.Module):
    """The speed-run net; call `whiten` with training images before the training.

    Args:
        n_classes: K.
        image_size: Height and width in pixels, at least 28.
        widths: Channels of the three blocks.
        whitening_filters: The strongest directions of 2 x 2 patches with their negatives, at most
            24; the weakest are mostly noise.
        whitening_bias: Train a bias after the whitening. Without it, no gradient is computed at
            full size, which saves a sixth of a step.
        logit_scale: Multiplies the logits, so that training starts with a flat softmax.
    """

    def __init__(
        self,
        *,
        n_classes: int = 10,
        image_size: int = 32,
        widths: tuple[int, int, int] | list[int] = (32, 64, 128),
        whitening_filters: int = _DIRECTIONS * 2,
        whitening_bias: bool = True,
        logit_scale: float = 1 / 9,
    ) -> None:
        super().__init__()
        if image_size < 28:
            raise ValueError(f"image_size: expected at least 28 px, got {image_size}")
        if whitening_filters % 2 or not 2 <= whitening_filters <= 2 * _DIRECTIONS:
            raise ValueError(
                f"whitening_filters: expected an even number up to {2 * _DIRECTIONS}, "
                f"got {whitening_filters}"
            )
        self.whitening = nn.Conv2d(3, whitening_filters, _WHITENING_PX, bias=whitening_bias)
        self.whitening.weight.requires_grad_(False)
        pairs = zip((whitening_filters, *widths[:2]), widths, strict=True)
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in pairs))
        self.head = nn.Linear(widths[2], n_classes, bias=False)
        self.logit_scale = logit_scale

    @torch.no_grad()
    def whiten(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first filters to the whitened patches of `images` and their negatives.

        Args:
            images: Normalized training images `[N, 3, H, W]`; a few thousand are enough.
            eps: Added to the eigenvalues, so that flat directions are not amplified.
        """
        patches = nn.functional.unfold(images, _WHITENING_PX)  # [N, 12, L]
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])  # [N L, 12]
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        strongest = (vectors / (values + eps).sqrt()).T.flip(0)[: self.whitening.out_channels // 2]
        filters = strongest.reshape(-1, 3, _WHITENING_PX, _WHITENING_PX)
        self.whitening.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` to logits `[N, K]`."""
        out = self.blocks(nn.functional.gelu(self.whitening(x)))
        # Not adaptive max pooling, which torch 2.11 cannot export to ONNX.
        logits: Tensor = self.head(out.amax((2, 3))) * self.logit_scale
        return logits
