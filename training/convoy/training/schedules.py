"""Schedules, as pure functions of the completed share of the training."""

import math

from convoy.training.recipe import Recipe

_GROWTH_PX = 4


def rate_factor(recipe: Recipe, done: float) -> float:
    """Return the factor of the peak rate.

    1) A linear increase from a tenth of the peak over `warmup_share`. 2) Then a linear
    (triangular) or cosine decrease to a hundredth, or no change. `plateau` only warms up here; the
    validation loss determines the rest. `one_cycle` increases by half a cosine from 1/25 of the
    peak and decreases by another to 1/250,000 (Smith and Topin, 2017, arXiv 1708.07120, in the form
    of `torch.optim.lr_scheduler.OneCycleLR`).

    Args:
        recipe: Its schedule is used.
        done: Completed share of all steps, 0 to 1.
    """
    warmup = recipe.warmup_share
    if done < warmup:
        climbed = done / warmup
        return _cosine(0.04, 1, climbed) if recipe.schedule == "one_cycle" else 0.1 + 0.9 * climbed
    rest = (done - warmup) / (1 - warmup)
    match recipe.schedule:
        case "triangular":
            return 1 - 0.99 * rest
        case "cosine":
            return _cosine(1, 0.01, rest)
        case "one_cycle":
            return _cosine(1, 4e-6, rest)
        case "constant" | "plateau":
            return 1.0


def size_px(recipe: Recipe, done: float) -> int:
    """Return the side of the training images: from start_px to image_size in steps of four.

    Small images cost less, and the first epochs need no detail. Source: Tan and Le (2021),
    arXiv 2104.00298, "progressive learning", here without its growing regularization.

    Args:
        recipe: Has both sizes and the share of the training between them.
        done: Completed share of all steps, 0 to 1.
    """
    if done >= recipe.growth_share:
        return recipe.image_size
    steps = -(-(recipe.image_size - recipe.start_px) // _GROWTH_PX)
    return recipe.start_px + _GROWTH_PX * int(steps * done / recipe.growth_share)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
