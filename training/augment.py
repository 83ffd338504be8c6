"""Augmentation of a whole batch on its device, with a draw of its own for every image."""

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Draws:
    """The random choices for N images, on the CPU; None where the recipe has no such step.

    Attributes:
        mirrored: Which to mirror, `[N]` bool.
        offsets: Rows and columns to move by, `[N, 2]`.
        centres: Row and column of the middle of the square that is cut out, `[N, 2]`.
    """

    mirrored: Tensor | None = None
    offsets: Tensor | None = None
    centres: Tensor | None = None

    def __getitem__(self, chosen: slice) -> "Draws":
        parts = (getattr(self, field.name) for field in fields(self))
        return Draws(*(part if part is None else part[chosen] for part in parts))


def draw(recipe: Recipe, coins: Tensor, epoch: int, draws: torch.Generator) -> Draws:
    """Draws what `augment` needs for images of the recipe's size.

    Args:
        recipe: Names the steps.
        coins: 0 or 1 for each image `[N]`, the same in every epoch, for the alternating flip.
        epoch: Counted from 0.
        draws: CPU generator of all random numbers.
    """
    count = len(coins)
    mirrored = offsets = centres = None
    if recipe.flip == "random":
        mirrored = torch.rand(count, generator=draws) < 0.5
    elif recipe.flip == "alternating":
        mirrored = alternating(coins, epoch)
    if recipe.shift_px:
        span = 2 * recipe.shift_px + 1
        offsets = torch.randint(span, (count, 2), generator=draws) - recipe.shift_px
    if recipe.cutout_px:
        centres = torch.randint(recipe.image_size, (count, 2), generator=draws)
    return Draws(mirrored, offsets, centres)


def alternating(coins: Tensor, epoch: int) -> Tensor:
    """Which images `[N]` to mirror: those of coin 0, then those of coin 1, epoch by epoch.

    Source: Jordan (2024), arXiv 2404.00498, section 3.6; in any two epochs every image is seen both
    ways, which independent draws do not ensure.
    """
    return (coins + epoch) % 2 == 0


def move(images: Tensor, draws: Draws) -> Tensor:
    """Mirrors and shifts pixels `[N, H, W, C]`, reflecting the border: whole rows, then columns."""
    if draws.mirrored is None and draws.offsets is None:
        return images
    count, height, width, channels = images.shape
    device = images.device
    still = torch.zeros(count, 2, dtype=torch.int64)
    offsets = still if draws.offsets is None else draws.offsets
    mirrored = still[:, 0] if draws.mirrored is None else draws.mirrored
    down, right = offsets[:, 0] + height, offsets[:, 1] + width + mirrored * (2 * width)
    rows = _sources(height, 1, device).index_select(0, down.to(device))
    columns = _sources(width, channels, device).index_select(0, right.to(device))
    first = torch.arange(0, count * height, height, device=device)[:, None]
    shifted = images.reshape(count * height, width * channels).index_select(
        0, (first + rows).flatten()
    )
    # An image's columns are the same in all its rows, so their indices stay few.
    source = columns[:, None].expand(count, height, -1)
    return shifted.view(count, height, -1).gather(2, source).view(images.shape)


@lru_cache(maxsize=8)
def _sources(size: int, channels: int, device: torch.device) -> Tensor:
    """What each value of a line comes from, for every offset, then for the mirrored line.

    Kept, since a look-up takes fewer steps for a batch than working it out.

    Returns:
        `[4 * size, size * channels]`; a line moved by d is at `size + d`, one that is mirrored
        first at `3 * size + d`.
    """
    moved = torch.arange(size) - torch.arange(-size, size)[:, None]
    pixels = _reflect(moved, size)
    pixels = torch.cat((pixels, size - 1 - pixels))[:, :, None]
    return (pixels * channels + torch.arange(channels)).flatten(1).to(device)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond 0..size-1 turned back at the edge pixel, which is not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()


def scale(images: Tensor, size_px: int) -> Tensor:
    """Resizes pixels `[N, H, W, C]` to `[N, size_px, size_px, C]`, averaging what it shrinks."""
    if images.shape[1:3] == (size_px, size_px):
        return images
    planes = images.permute(0, 3, 1, 2)
    # On CUDA torch resizes floats only.
    planes = planes if images.device.type == "cpu" else planes.float()
    sized = functional.interpolate(planes, (size_px, size_px), mode="bilinear", antialias=True)
    sized = sized.round().to(torch.uint8) if sized.is_floating_point() else sized
    return sized.permute(0, 2, 3, 1)


def cutout(images: Tensor, centres: Tensor, side_px: int) -> Tensor:
    """Puts a square of mean colour (0) over each image `[N, C, H, W]`, centred at `[N, 2]`.

    Source: DeVries and Taylor (2017), arXiv 1708.04552; the square may reach over the border.
    """
    _, _, height, width = images.shape
    first = centres.to(images.device) - side_px // 2  # [N, 2]
    rows = torch.arange(height, device=images.device) - first[:, :1]  # [N, H]
    columns = torch.arange(width, device=images.device) - first[:, 1:]  # [N, W]
    inside_rows = (rows >= 0) & (rows < side_px)
    inside_columns = (columns >= 0) & (columns < side_px)
    covered = inside_rows[:, :, None] & inside_columns[:, None, :]
    return images.masked_fill(covered[:, None], 0.0)
