"""Learning-rate schedules as pure functions of the share of training that is done."""

import math

from training.recipe import Recipe


def rate_factor(recipe: Recipe, done: float) -> float:
    """What to multiply the peak rate with.

    1) A linear climb from a tenth of the peak over `warmup_share`. 2) From there a straight line
    (triangular) or half a cosine down to a hundredth, or no change. `plateau` is driven by the
    validation loss instead and only warms up here.

    Args:
        recipe: Names the schedule.
        done: Steps taken over all steps, 0 to 1.
    """
    warmup = recipe.warmup_share
    if done < warmup:
        return 0.1 + 0.9 * done / warmup
    rest = (done - warmup) / (1 - warmup)
    match recipe.schedule:
        case "triangular":
            return 1 - 0.99 * rest
        case "cosine":
            return 0.01 + 0.99 * (1 + math.cos(math.pi * rest)) / 2
        case "constant" | "plateau":
            return 1.0
