"""Augmentation of a whole batch on its device, with a draw of its own for every image."""

import torch
from torch import Tensor
from torch.nn import functional

from training.recipe import Recipe


def augment(
    images: Tensor, coins: Tensor, epoch: int, recipe: Recipe, draws: torch.Generator
) -> Tensor:
    """Applies what the recipe asks for.

    Args:
        images: Normalised images `[N, C, H, W]`.
        coins: 0 or 1 for each `[N]`, the same in every epoch, for the alternating flip.
        epoch: Counted from 0.
        recipe: Names the steps.
        draws: CPU generator of all random numbers.
    """
    if recipe.flip == "random":
        images = flip(images, torch.rand(len(images), generator=draws) < 0.5)
    elif recipe.flip == "alternating":
        images = flip(images, alternating(coins, epoch))
    if recipe.shift_px:
        span = 2 * recipe.shift_px + 1
        offsets = torch.randint(span, (len(images), 2), generator=draws)
        images = shift(images, offsets - recipe.shift_px)
    if recipe.cutout_px:
        size = torch.tensor(images.shape[2:])
        centres = (torch.rand(len(images), 2, generator=draws) * size).long()
        images = cutout(images, centres, recipe.cutout_px)
    return images


def alternating(coins: Tensor, epoch: int) -> Tensor:
    """Which images `[N]` to mirror: those of coin 0, then those of coin 1, epoch by epoch.

    Source: Jordan (2024), arXiv 2404.00498, section 3.6; in any two epochs every image is seen both
    ways, which independent draws do not ensure.
    """
    return (coins + epoch) % 2 == 0


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors the images `[N, C, H, W]` named by `mirrored` `[N]` bool, left to right."""
    chosen = mirrored.to(images.device).view(-1, 1, 1, 1)
    return torch.where(chosen, images.flip(3), images)


def shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Moves images `[N, C, H, W]` by row and column offsets `[N, 2]`, reflecting the border."""
    _, _, height, width = images.shape
    offsets = offsets.to(images.device)
    reach = int(offsets.abs().max())
    padded = functional.pad(images, 4 * (reach,), mode="reflect")  # [N, C, H + 2r, W + 2r]
    rows = torch.arange(height, device=images.device) + reach - offsets[:, :1]  # [N, H]
    columns = torch.arange(width, device=images.device) + reach - offsets[:, 1:]  # [N, W]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)  # [N, C, H, W]


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
