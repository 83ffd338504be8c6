from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from convoy.training import recipe as recipes
from convoy.training.errors import RecipeError
from convoy.training.recipe import Recipe
from convoy.training.schedules import rate_factor, size_px


def test_the_package_ships_the_recipes() -> None:
    assert recipes.names() == (
        *("digits", "fast", "finetune", "finetune-strong"),
        *("lecture", "lecture-resnet", "scratch-224", "wide"),
    )
    for name in recipes.names():
        recipes.load_recipe(name)


def test_the_lectures_recipe_is_the_slides() -> None:
    lecture = recipes.load_recipe("lecture")
    assert (lecture.model, lecture.epochs, lecture.batch_size) == ("net", 10, 64)
    assert (lecture.optimizer, lecture.lr, lecture.momentum) == ("sgd", 1e-2, 0)
    assert lecture.schedule == "plateau"
    assert lecture.std == (0.2023, 0.1994, 0.2010)
    resnet = recipes.load_recipe("lecture-resnet")
    assert (resnet.epochs, resnet.model_arguments) == (3, {"n_blocks": 3})


def test_flags_override_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('model = "net"\nepochs = 7\nlr = 1\n')
    read = recipes.load_recipe(str(tmp_path / "own.toml"), {"epochs": 3})
    assert (read.model, read.epochs, read.lr, read.batch_size) == ("net", 3, 1, 64)
    assert recipes.make_recipe(read.as_dict()) == read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"color": 1}, "unknown setting 'color'"),
        ({"epochs": 2.5}, "epochs: expected int, got 2.5"),
        ({"epochs": True}, "epochs: expected int"),
        ({"lr": "fast"}, "lr: expected a number"),
        ({"lr": -1}, "lr: expected more than 0"),
        ({"optimizer": "lion"}, "expected one of sgd, adamw, muon"),
        ({"shift_px": 32}, "less than image_size, got 32"),
        ({"mean": [0.5]}, "expected 3 numbers"),
        ({"momentum": 1.0}, "0 <= x < 1"),
        ({"shift_px": -1}, "0 or more"),
        ({"start_px": 0}, "start_px: expected more than 0"),
        ({"start_px": 33, "growth_share": 0.5}, "start_px: expected at most image_size, got 33"),
        ({"growth_share": 1.0}, "0 <= x < 1"),
        ({"valid_share": 0.0}, "valid_share: expected 0 < x < 1, got 0.0"),
        ({"resize_shorter_px": 31}, "resize_shorter_px: expected 0 or at least image_size"),
        ({"antialias": False, "interpolation": "bicubic"}, "antialias: false is for"),
        ({"decode": "fast"}, "decode: expected one of exact, scaled"),
        ({"decode": "scaled", "antialias": False}, "antialias: expected true with decode scaled"),
        ({"crop_scale": [0.5, 0.2]}, "crop_scale: expected two shares"),
        ({"layer_decay": 1.5}, "layer_decay: expected 0 < x <= 1"),
        ({"accumulate": 0}, "accumulate: expected more than 0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.make_recipe(settings)


def test_another_image_size_brings_the_shorter_side_along(tmp_path: Path) -> None:
    larger = recipes.load_recipe("finetune", {"image_size": 384})
    assert (larger.image_size, larger.resize_shorter_px) == (384, 439)
    own = recipes.load_recipe("finetune", {"image_size": 384, "resize_shorter_px": 400})
    assert own.resize_shorter_px == 400
    assert recipes.load_recipe("fast", {"image_size": 64}).resize_shorter_px == 0


def test_broken_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("lr = ")
    with pytest.raises(RecipeError, match=r"own\.toml"):
        recipes.load_recipe(str(tmp_path / "own.toml"))


def test_settings_on_the_command_line_are_toml_or_text() -> None:
    assert recipes.parse_setting("lr=1e-3") == ("lr", 1e-3)
    assert recipes.parse_setting("flip=random") == ("flip", "random")
    assert recipes.parse_setting("widths=[8, 16, 32]") == ("widths", [8, 16, 32])


@pytest.mark.parametrize(
    ("data", "model", "has_weights", "expected"),
    [
        ("digits", None, False, "digits"),
        ("digits", "resnet18", True, "digits"),
        ("cifar10", None, False, "fast"),
        ("imagefolder:photos", None, False, "fast"),
        ("imagefolder:photos", None, True, "finetune"),
        ("imagefolder:photos", "resnet18", False, "finetune"),
        ("imagefolder:photos", "airbench", True, "fast"),
        ("cifar10", "net", False, "lecture"),
        ("cifar10", "net_res_deep", False, "lecture-resnet"),
    ],
)
def test_a_run_without_a_recipe_takes_the_one_that_fits(
    data: str, model: str | None, has_weights: bool, expected: str
) -> None:
    assert recipes.default_for(data, model, has_weights) == expected
    if model and data != "digits" and not model.startswith("resnet"):
        assert recipes.load_recipe(expected).model == model


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("triangular", [0.1, 0.55, 1.0, 0.505, 0.01]),
        ("cosine", [0.1, 0.55, 1.0, 0.505, 0.01]),
        ("constant", [0.1, 0.55, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_climb_then_follow_their_curve(schedule: str, expected: list[float]) -> None:
    recipe = Recipe(schedule=schedule, warmup_share=0.2)  # type: ignore[arg-type]
    factors = [rate_factor(recipe, done) for done in (0, 0.1, 0.2, 0.6, 1)]
    assert factors == pytest.approx(expected)


def test_images_grow_by_four_pixels_and_end_whole() -> None:
    recipe = Recipe(start_px=16, image_size=30, growth_share=0.5)
    sizes = [size_px(recipe, step / 32) for step in range(33)]
    assert sizes == [16] * 4 + [20] * 4 + [24] * 4 + [28] * 4 + [30] * 17
    assert size_px(Recipe(start_px=16), 0) == 32
    assert size_px(Recipe(start_px=32, growth_share=0.5), 0) == 32


def test_the_cosine_is_above_the_line_first_and_below_it_later() -> None:
    line, curve = (Recipe(schedule=name) for name in ("triangular", "cosine"))  # type: ignore[arg-type]
    assert rate_factor(curve, 0.25) > rate_factor(line, 0.25)
    assert rate_factor(curve, 0.75) < rate_factor(line, 0.75)


def test_one_cycle_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    theirs = OneCycleLR(optimizer, max_lr=1, total_steps=101, pct_start=0.3, cycle_momentum=False)
    # PyTorch's climb ends one step before its pct_start.
    recipe = Recipe(schedule="one_cycle", warmup_share=(0.3 * 101 - 1) / 100)
    for step in range(100):
        assert rate_factor(recipe, step / 100) == pytest.approx(theirs.get_last_lr()[0]), step
        optimizer.step()
        theirs.step()
