"""Augmentation: of a whole batch on its device, and of single images by torchvision's transforms.

The random choices differ for every image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from convoy.training.data import Preprocessing
from convoy.training.data.images import preprocess
from convoy.training.recipe import Recipe

_GRAY = 124
"""About the mean of photographs, 0 to 255."""


@dataclass(frozen=True, slots=True)
class Draws:
    """The random choices for N images, on the CPU; None without such a step in the recipe.

    Attributes:
        mirrored: Images to mirror, `[N]` bool.
        offsets: Rows and columns to move by, `[N, 2]`.
        centers: Row and column of the center of the square to cut out, `[N, 2]`.
    """

    mirrored: Tensor | None = None
    offsets: Tensor | None = None
    centers: Tensor | None = None

    def __getitem__(self, chosen: slice) -> "Draws":
        parts = (getattr(self, field.name) for field in fields(self))
        return Draws(*(part if part is None else part[chosen] for part in parts))


def draw(recipe: Recipe, coins: Tensor, epoch: int, draws: torch.Generator) -> Draws:
    """Draw the random choices of `augment` for images of the recipe's size.

    Args:
        recipe: Names the steps.
        coins: 0 or 1 for each image `[N]`, the same in every epoch, for the alternating flip.
        epoch: Counted from 0.
        draws: CPU generator of the random numbers.
    """
    count = len(coins)
    mirrored = offsets = centers = None
    if recipe.flip == "random":
        mirrored = torch.rand(count, generator=draws) < 0.5
    elif recipe.flip == "alternating":
        mirrored = alternating(coins, epoch)
    if recipe.shift_px:
        span = 2 * recipe.shift_px + 1
        offsets = torch.randint(span, (count, 2), generator=draws) - recipe.shift_px
    if recipe.cutout_px:
        centers = torch.randint(recipe.image_size, (count, 2), generator=draws)
    return Draws(mirrored, offsets, centers)


def alternating(coins: Tensor, epoch: int) -> Tensor:
    """Return the images `[N]` to mirror: those of coin 0, then of coin 1, in turn by epoch.

    Source: Jordan (2024), arXiv 2404.00498, section 3.6. In two successive epochs every image
    occurs in both orientations, which independent draws do not ensure.
    """
    return (coins + epoch) % 2 == 0


def move(images: Tensor, draws: Draws) -> Tensor:
    """Mirror and shift pixels `[N, H, W, C]`, reflecting the border: whole rows, then columns."""
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
    # The columns are the same in all rows of an image, so one row of indices suffices.
    source = columns[:, None].expand(count, height, -1)
    return shifted.view(count, height, -1).gather(2, source).view(images.shape)


@lru_cache(maxsize=8)
def _sources(size: int, channels: int, device: torch.device) -> Tensor:
    """Return the source index of each value of a line, by offset, then for the mirrored line.

    Cached, because a lookup takes fewer operations per batch than the computation.

    Returns:
        `[4 * size, size * channels]`; a line moved by d is at `size + d`, one that is mirrored
        first at `3 * size + d`.
    """
    moved = torch.arange(size) - torch.arange(-size, size)[:, None]
    pixels = _reflect(moved, size)
    pixels = torch.cat((pixels, size - 1 - pixels))[:, :, None]
    return (pixels * channels + torch.arange(channels)).flatten(1).to(device)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect indices beyond 0..size-1 at the edge pixel, which is not repeated."""
    last = size - 1
    return last - (last - index.abs()).abs()


def scale(images: Tensor, size_px: int) -> Tensor:
    """Resize pixels `[N, H, W, C]` to `[N, size_px, size_px, C]`, averaging what it shrinks."""
    if images.shape[1:3] == (size_px, size_px):
        return images
    planes = images.permute(0, 3, 1, 2)
    # On CUDA, torch resizes only floats.
    planes = planes if images.device.type == "cpu" else planes.float()
    sized = functional.interpolate(planes, (size_px, size_px), mode="bilinear", antialias=True)
    sized = sized.round().to(torch.uint8) if sized.is_floating_point() else sized
    return sized.permute(0, 2, 3, 1)


def cutout(images: Tensor, centers: Tensor, side_px: int) -> Tensor:
    """Put a square of mean color (0) over each image `[N, C, H, W]`, centered at `[N, 2]`.

    Source: DeVries and Taylor (2017), arXiv 1708.04552; the square may extend beyond the border.
    """
    _, _, height, width = images.shape
    first = centers.to(images.device) - side_px // 2  # [N, 2]
    rows = torch.arange(height, device=images.device) - first[:, :1]  # [N, H]
    columns = torch.arange(width, device=images.device) - first[:, 1:]  # [N, W]
    inside_rows = (rows >= 0) & (rows < side_px)
    inside_columns = (columns >= 0) & (columns < side_px)
    covered = inside_rows[:, :, None] & inside_columns[:, None, :]
    return images.masked_fill(covered[:, None], 0.0)


class ImageAugmentation:
    """torchvision's transforms of one image, from its file's pixels to the net's size.

    Args:
        recipe: Names the transforms.
        steps: The preprocessing of an image without a random crop.
    """

    def __init__(self, recipe: Recipe, steps: Preprocessing) -> None:
        # torchvision takes seconds to import; most recipes do not need it.
        from torchvision.transforms import v2

        self._steps = None if recipe.crop == "random_resized" else steps
        self._seed = recipe.seed
        filter_ = v2.InterpolationMode(recipe.interpolation)
        chosen: list[torch.nn.Module] = []
        if recipe.crop == "random_resized":
            chosen.append(
                v2.RandomResizedCrop(
                    recipe.image_size,
                    scale=recipe.crop_scale,
                    interpolation=filter_,
                    antialias=recipe.antialias,
                )
            )
        if recipe.auto_augment == "trivial":
            chosen.append(v2.TrivialAugmentWide(interpolation=filter_))
        elif recipe.auto_augment == "rand":
            chosen.append(v2.RandAugment(interpolation=filter_))
        if recipe.color_jitter:
            chosen.append(v2.ColorJitter(*3 * (recipe.color_jitter,)))
        chosen.append(v2.PILToTensor())
        if recipe.random_erasing:
            chosen.append(v2.RandomErasing(recipe.random_erasing, value=_GRAY))
        self._transform = v2.Compose(chosen)

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """Return pixels `[H, W, 3]` uint8; equal seeds, epochs and indices give equal ones."""
        if self._steps is not None:
            image = Image.fromarray(preprocess(image, self._steps))
        state = np.random.SeedSequence((self._seed, epoch, index)).generate_state(1, np.uint64)
        with _seeded(int(state[0])):
            planes: Tensor = self._transform(image)  # [3, H, W] uint8
        return planes.permute(1, 2, 0).contiguous()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the process's CPU generator, from which the transforms draw, for the block.

    torch.manual_seed would seed all devices too: it notes the call stack for each kind that is not
    initialized, which takes as long as the transforms.
    """
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(before)


def augments_images(recipe: Recipe) -> bool:
    """Tell whether a recipe transforms single images, which needs an `ImageAugmentation`."""
    return (
        recipe.crop == "random_resized"
        or recipe.auto_augment != "none"
        or recipe.color_jitter > 0
        or recipe.random_erasing > 0
    )


def make_mixer(recipe: Recipe, n_classes: int) -> torch.nn.Module | None:
    """MixUp or CutMix, or one of both for each batch: mixes images, and labels `[N, K]`."""
    if not recipe.mixup_alpha and not recipe.cutmix_alpha:
        return None
    from torchvision.transforms import v2

    mixers: list[torch.nn.Module] = []
    if recipe.mixup_alpha:
        mixers.append(v2.MixUp(alpha=recipe.mixup_alpha, num_classes=n_classes))
    if recipe.cutmix_alpha:
        mixers.append(v2.CutMix(alpha=recipe.cutmix_alpha, num_classes=n_classes))
    mixer: torch.nn.Module = v2.RandomChoice(mixers)
    return mixer
