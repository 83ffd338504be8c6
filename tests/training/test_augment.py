import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from convoy.training.augment import (
    Draws,
    ImageAugmentation,
    alternating,
    augments_images,
    cutout,
    draw,
    make_mixer,
    move,
    scale,
)
from convoy.training.recipe import Recipe
from convoy.training.run import preprocessing

PIXELS = torch.randint(256, (6, 8, 9, 3), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)
IMAGES = torch.arange(6 * 3 * 8 * 8, dtype=torch.float32).view(6, 3, 8, 8) + 1
MIRRORED = torch.tensor([True, False, False, True, True, False])


def test_shifts_are_numpys_reflected_padding_image_by_image() -> None:
    offsets = torch.tensor([[0, 0], [2, 0], [0, -2], [-1, 2], [2, 2], [-2, -2]])
    moved = move(PIXELS, Draws(offsets=offsets))
    for image, (down, right), answer in zip(PIXELS, offsets.tolist(), moved, strict=True):
        padded = np.pad(image.numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
        expected = padded[2 - down : 10 - down, 2 - right : 11 - right]
        assert np.array_equal(answer.numpy(), expected)


def test_flips_mirror_the_chosen_images_only() -> None:
    flipped = move(PIXELS, Draws(mirrored=MIRRORED))
    for image, mirrored, answer in zip(PIXELS, MIRRORED, flipped, strict=True):
        expected = image.numpy()[:, ::-1] if mirrored else image.numpy()
        assert np.array_equal(answer.numpy(), expected)


def test_a_mirrored_image_is_then_shifted() -> None:
    offsets = torch.randint(-2, 3, (6, 2), generator=torch.Generator().manual_seed(1))
    both = move(PIXELS, Draws(MIRRORED, offsets))
    assert torch.equal(both, move(move(PIXELS, Draws(MIRRORED)), Draws(offsets=offsets)))


def test_no_step_leaves_the_images_alone() -> None:
    assert move(PIXELS, draw(Recipe(), torch.zeros(6), 0, torch.Generator())) is PIXELS


def test_the_alternating_flip_shows_both_ways_in_any_two_epochs() -> None:
    coins = torch.tensor([0, 1, 1, 0])
    first, second, third = (alternating(coins, epoch) for epoch in range(3))
    assert first.tolist() == [True, False, False, True]
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    draws = draw(Recipe(flip="alternating"), coins, 1, torch.Generator().manual_seed(0))
    assert draws.mirrored is not None
    assert torch.equal(draws.mirrored, second)


def test_scaling_is_pillows_to_the_next_level() -> None:
    for size_px in (4, 6, 12):
        scaled = scale(PIXELS, size_px)
        assert (scaled.shape, scaled.dtype) == ((6, size_px, size_px, 3), torch.uint8)
        for image, answer in zip(PIXELS, scaled, strict=True):
            size = (size_px, size_px)
            expected = Image.fromarray(image.numpy()).resize(size, Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(expected, int) - answer.numpy()).max() <= 1
    square = PIXELS[:, :, :8]
    assert scale(square, 8) is square


def test_cutout_covers_one_square_per_image() -> None:
    centers = torch.tensor([[4, 4], [0, 0], [7, 7], [2, 5], [4, 4], [4, 4]])
    answer = cutout(IMAGES, centers, 4)
    assert torch.equal(answer[0] == 0, answer[0, :1].eq(0).expand(3, 8, 8))
    assert (answer[0, 0] == 0).nonzero().min(0).values.tolist() == [2, 2]
    assert [(image[0] == 0).sum().item() for image in answer[:4]] == [16, 4, 9, 16]


def test_every_image_gets_a_draw_of_its_own_that_the_seed_repeats() -> None:
    same = PIXELS[:1].expand(64, 8, 9, 3)
    recipe = Recipe(flip="random", shift_px=2, cutout_px=2)

    def moved(seed: int) -> torch.Tensor:
        draws = draw(recipe, torch.arange(64) % 2, 0, torch.Generator().manual_seed(seed))
        return move(same, draws)

    assert len(moved(0).unique(dim=0)) > 30
    assert torch.equal(moved(0), moved(0))
    assert not torch.equal(moved(0), moved(1))


def test_draws_are_divided_like_the_batch() -> None:
    recipe = Recipe(flip="random", shift_px=2, cutout_px=2)
    draws = draw(recipe, torch.zeros(6), 0, torch.Generator().manual_seed(0))
    parts = [move(PIXELS[rank::2], draws[rank::2]) for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), move(PIXELS, draws))


PHOTO = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8), mode="RGB"
)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": "random_resized"},
        {"auto_augment": "trivial"},
        {"auto_augment": "rand"},
        {"color_jitter": 0.4},
        {"random_erasing": 0.9},
    ],
)
def test_torchvisions_transforms_draw_anew_for_each_image_and_epoch(
    settings: dict[str, object],
) -> None:
    recipe = Recipe(image_size=32, resize_shorter_px=36, **settings)  # type: ignore[arg-type]
    assert augments_images(recipe)
    augmentation = ImageAugmentation(recipe, preprocessing(recipe))
    state = torch.get_rng_state()
    keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
    assert len({bytes(augmentation(PHOTO, *key).numpy()) for key in keys}) > 6
    first = augmentation(PHOTO, 3, 5)
    assert (first.shape, first.dtype) == ((32, 32, 3), torch.uint8)
    assert torch.equal(pickle.loads(pickle.dumps(augmentation))(PHOTO, 3, 5), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_those_of_a_seeded_process_and_no_device_is_seeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seeding devices for each image would take as long as the transforms."""
    recipe = Recipe(image_size=16, resize_shorter_px=18, crop="random_resized", seed=7)
    augmentation = ImageAugmentation(recipe, preprocessing(recipe))
    seed = np.random.SeedSequence((7, 2, 5)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))
    expected = augmentation._transform(PHOTO).permute(1, 2, 0)
    monkeypatch.setattr(torch, "manual_seed", None)
    assert torch.equal(augmentation(PHOTO, 2, 5), expected)


def test_a_recipe_without_transforms_needs_none() -> None:
    assert not augments_images(Recipe(flip="random", shift_px=2, mixup_alpha=0.2))
    assert make_mixer(Recipe(), 4) is None


def test_random_crops_come_from_the_whole_image() -> None:
    """A center crop would never show the left border, which is white here."""
    pixels = np.zeros((40, 70, 3), np.uint8)
    pixels[:, :12] = 255
    recipe = Recipe(image_size=16, resize_shorter_px=16, crop="random_resized")
    augmentation = ImageAugmentation(recipe, preprocessing(recipe))
    shown = [augmentation(Image.fromarray(pixels), 0, index).max() for index in range(20)]
    assert max(shown) == 255
    center = ImageAugmentation(replace(recipe, crop="center"), preprocessing(recipe))
    assert all(center(Image.fromarray(pixels), 0, index).max() == 0 for index in range(20))


@pytest.mark.parametrize("settings", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}])
def test_mixed_labels_tell_the_shares_of_mixed_pixels(settings: dict[str, float]) -> None:
    mixer = make_mixer(Recipe(**settings), 2)
    assert mixer is not None
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 0, 1])
    images = labels.view(4, 1, 1, 1).expand(4, 3, 16, 16).float()
    mixed, targets = mixer(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1])
    assert 0 < targets[0, 1] < 1
