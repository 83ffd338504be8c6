"""The lecture's two nets, with its options for downsampling and regularization.

Source: lecture part 5, slides "Convolutional Neural Networks" and "Building very deep models in
PyTorch"; Stevens, Antiga and Viehmann (2020), "Deep Learning with PyTorch", chapter 8.
"""

from typing import Literal, get_args

from torch import Tensor, nn

Downsample = Literal["max", "average", "stride"]


class Net(nn.Module):
    """The lecture's first ConvNet; 18,354 parameters with its defaults.

    Args:
        n_classes: K.
        image_size: Height and width in pixels; another size fails in `forward`.
        width: Channels of the first convolution; the second has half of them ("Adding width").
        downsample: Operation that halves the image after each convolution.
        dropout: Probability of zeroing a channel after each convolution.
        batch_norm: Normalize after each convolution.
    """

    def __init__(
        self,
        *,
        n_classes: int = 10,
        image_size: int = 32,
        width: int = 16,
        downsample: Downsample = "max",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_image_size(image_size)
        half, side = width // 2, image_size // 4
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.pool1 = _downsampling(downsample, width)
        self.conv2 = nn.Conv2d(width, half, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(half) if batch_norm else nn.Identity()
        self.pool2 = _downsampling(downsample, half)
        self.dropout = nn.Dropout2d(dropout)
        self.fc1 = nn.Linear(half * side * side, 32)
        self.fc2 = nn.Linear(32, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` to logits `[N, K]`."""
        out = self.pool1(self.norm1(self.conv1(images)).tanh())  # [N, width, H/2, W/2]
        out = self.pool2(self.norm2(self.conv2(self.dropout(out))).tanh())  # [N, width/2, H/4, W/4]
        # flatten keeps the batch axis, so a wrong image size fails in fc1; the slide's
        # view(-1, 512) would change the batch size.
        logits: Tensor = self.fc2(self.fc1(self.dropout(out).flatten(1)).tanh())
        return logits


class ResBlock(nn.Module):
    """Convolution, batch norm and ReLU with a skip connection (He et al., 2016).

    Initialized as in the book's chapter 8 (Kaiming weights, norm scale 0.5): without it, deep
    stacks may not train.
    """

    def __init__(self, n_chans: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_chans, n_chans, kernel_size=3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm2d(n_chans)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.constant_(self.batch_norm.weight, 0.5)
        nn.init.zeros_(self.batch_norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape `[N, C, H, W]`."""
        out: Tensor = self.dropout(self.batch_norm(self.conv(x)).relu())
        return out + x


class NetResDeep(nn.Module):
    """The lecture's residual net; 66,794 + 9,280 n_blocks parameters with 32 channels.

    Args:
        n_classes: K.
        image_size: Height and width in pixels; another size fails in `forward`.
        n_chans1: Channels of every convolution.
        n_blocks: Residual blocks.
        shared_blocks: Use ONE block n times, as the slide's `n_blocks * [ResBlock(...)]` does. Its
            batch norm then averages the statistics of all depths, which spoils the evaluation. Only
            to reproduce the slides, not for serving.
        downsample: Operation that halves the image, before and after the blocks.
        dropout: Probability of zeroing a channel in each block.
    """

    def __init__(
        self,
        *,
        n_classes: int = 10,
        image_size: int = 32,
        n_chans1: int = 32,
        n_blocks: int = 10,
        shared_blocks: bool = False,
        downsample: Downsample = "max",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_image_size(image_size)
        side = image_size // 4
        self.conv1 = nn.Conv2d(3, n_chans1, kernel_size=3, padding=1)
        self.pool1 = _downsampling(downsample, n_chans1)
        shared = ResBlock(n_chans1, dropout) if shared_blocks else None
        blocks = (shared or ResBlock(n_chans1, dropout) for _ in range(n_blocks))
        self.resblocks = nn.Sequential(*blocks)
        self.pool2 = _downsampling(downsample, n_chans1)
        self.fc1 = nn.Linear(n_chans1 * side * side, 32)
        self.fc2 = nn.Linear(32, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[N, 3, H, W]` to logits `[N, K]`."""
        out = self.pool1(self.conv1(images).relu())  # [N, C, H/2, W/2]
        out = self.pool2(self.resblocks(out))  # [N, C, H/4, W/4]
        logits: Tensor = self.fc2(self.fc1(out.flatten(1)).relu())
        return logits


def _downsampling(kind: Downsample, channels: int) -> nn.Module:
    """Halve height and width; only the strided convolution has parameters."""
    if kind not in get_args(Downsample):
        raise ValueError(f"downsample: expected one of {get_args(Downsample)}, got {kind!r}")
    match kind:
        case "max":
            return nn.MaxPool2d(2)
        case "average":
            return nn.AvgPool2d(2)
        case "stride":
            return nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)


def _check_image_size(image_size: int) -> None:
    if image_size < 4 or image_size % 4:
        raise ValueError(f"image_size: expected a multiple of 4 px, got {image_size}")
