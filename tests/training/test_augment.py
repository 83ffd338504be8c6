import numpy as np
import torch

from training.augment import alternating, augment, cutout, flip, shift
from training.recipe import Recipe

IMAGES = torch.arange(6 * 3 * 8 * 8, dtype=torch.float32).view(6, 3, 8, 8) + 1


def test_shifts_are_numpys_reflected_padding_image_by_image() -> None:
    offsets = torch.tensor([[0, 0], [2, 0], [0, -2], [-1, 2], [2, 2], [-2, -2]])
    moved = shift(IMAGES, offsets)
    for image, (down, right), answer in zip(IMAGES, offsets.tolist(), moved, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        expected = padded[:, 2 - down : 10 - down, 2 - right : 10 - right]
        assert np.array_equal(answer.numpy(), expected)


def test_flips_mirror_the_chosen_images_only() -> None:
    chosen = torch.tensor([True, False, False, True, True, False])
    flipped = flip(IMAGES, chosen)
    for image, mirrored, answer in zip(IMAGES, chosen, flipped, strict=True):
        expected = image.numpy()[..., ::-1] if mirrored else image.numpy()
        assert np.array_equal(answer.numpy(), expected)


def test_the_alternating_flip_shows_both_ways_in_any_two_epochs() -> None:
    coins = torch.tensor([0, 1, 1, 0])
    first, second, third = (alternating(coins, epoch) for epoch in range(3))
    assert first.tolist() == [True, False, False, True]
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    answer = augment(
        IMAGES[:4], coins, 1, Recipe(flip="alternating"), torch.Generator().manual_seed(0)
    )
    assert torch.equal(answer, flip(IMAGES[:4], second))


def test_cutout_covers_one_square_per_image() -> None:
    centres = torch.tensor([[4, 4], [0, 0], [7, 7], [2, 5], [4, 4], [4, 4]])
    answer = cutout(IMAGES, centres, 4)
    assert torch.equal(answer[0] == 0, answer[0, :1].eq(0).expand(3, 8, 8))
    assert (answer[0, 0] == 0).nonzero().min(0).values.tolist() == [2, 2]
    assert [(image[0] == 0).sum().item() for image in answer[:4]] == [16, 4, 9, 16]


def test_every_image_gets_a_draw_of_its_own_that_the_seed_repeats() -> None:
    same = IMAGES[:1].expand(64, 3, 8, 8)
    recipe = Recipe(flip="random", shift_px=2, cutout_px=2)

    def draw(seed: int) -> torch.Tensor:
        draws = torch.Generator().manual_seed(seed)
        return augment(same, torch.arange(64) % 2, 0, recipe, draws)

    assert len(draw(0).unique(dim=0)) > 40
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
