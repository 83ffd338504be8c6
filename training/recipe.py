"""How a net is trained: one frozen object, from TOML and flags, kept in every checkpoint."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from training.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every setting that changes the trained weights.

    Attributes:
        model: A name that `nets.create` knows.
        model_arguments: What the net takes beside classes and image size.
        image_size: Height and width of the input in pixels.
        resize_shorter_px: Shorter side before the centre crop; 0 resizes straight to image_size.
        mean: Subtracted per channel from pixels in 0..1; empty measures it on the training set.
        std: Divided by, per channel; empty measures it likewise.
        epochs: Passes over the training set.
        batch_size: Images a step.
        optimizer: `sgd` (with Nesterov's momentum where momentum > 0), `adamw`, or `muon`, which is
            sgd except for the kernels of convolutions.
        lr: Peak learning rate, for a loss that is the mean of its batch.
        momentum: Of `sgd` and `muon`.
        muon_lr: Peak learning rate of the kernels under `muon`.
        muon_momentum: Of the kernels under `muon`.
        weight_decay: Added to the gradient as weight_decay * p (sgd), or decoupled (adamw).
        decay_all: Decay biases and norm parameters as well, as the lecture does.
        norm_bias_lr_factor: Multiplies the rate of the norms' biases (Jordan, 2024).
        l1: Penalty l1 * sum(abs(p)), added to the loss.
        l2: Penalty l2 * sum(p ** 2); for sgd the same as weight_decay = 2 * l2.
        schedule: Of the learning rate, see `training.schedules`; `plateau` follows the validation
            loss.
        warmup_share: Share of all steps in which the rate climbs to lr.
        label_smoothing: Share of the target given to all classes alike.
        growth_share: Share of all steps in which the training images grow to image_size.
        start_px: Their height and width at first.
        flip: Mirror each image at random, or `alternating` from epoch to epoch.
        shift_px: Largest shift of an image, in pixels, with reflected borders.
        cutout_px: Side of a square of mean colour put over each image; 0 for none.
        average: What is evaluated and kept: the weights, their moving average, or Lookahead's.
        ema_decay: Of `ema`, a step.
        clip_norm: Largest norm of the gradient; 0 does not clip.
        freeze_backbone: Train the head alone; everything before it keeps its weights and its batch
            norm's statistics.
        precision: Of the training step; `auto` is bfloat16 on a GPU that has it and float32
            elsewhere. Evaluation is in float32.
        compile: Compile the training step with torch.compile.
        patience: Stops after so many epochs without a better validation loss; 0 never.
        seed: Equal seeds give equal weights on a CPU, to the bit.
    """

    model: str = "net_res_deep"
    model_arguments: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    resize_shorter_px: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    muon_lr: float = 0.1
    muon_momentum: float = 0.6
    weight_decay: float = 0.0
    decay_all: bool = False
    norm_bias_lr_factor: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    schedule: Literal["constant", "plateau", "cosine", "triangular", "one_cycle"] = "constant"
    warmup_share: float = 0.0
    label_smoothing: float = 0.0
    growth_share: float = 0.0
    start_px: int = 16
    flip: Literal["none", "random", "alternating"] = "none"
    shift_px: int = 0
    cutout_px: int = 0
    average: Literal["none", "ema", "lookahead"] = "none"
    ema_decay: float = 0.999
    clip_norm: float = 0.0
    freeze_backbone: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "start_px", "epochs", "batch_size", "lr", "muon_lr"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in (
            "warmup_share",
            "growth_share",
            "label_smoothing",
            "momentum",
            "muon_momentum",
            "ema_decay",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name}: expected 0 <= x < 1, got {getattr(self, name)}")
        for name in ("weight_decay", "l1", "l2", "shift_px", "cutout_px", "clip_norm", "patience"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.shift_px >= self.image_size:
            raise RecipeError(f"shift_px: expected less than image_size, got {self.shift_px}")
        if self.growth_share and self.start_px > self.image_size:
            raise RecipeError(f"start_px: expected at most image_size, got {self.start_px}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise RecipeError(f"{name}: expected 3 numbers or none, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only, as TOML, JSON and a checkpoint hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    folder = resources.files("training") / "recipes"
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir()))


def default_for(data: str, model: str | None = None, has_weights: bool = False) -> str:
    """The recipe that a run without `--recipe` takes.

    The digits have their own. Elsewhere our nets take the recipe made for them and torchvision's
    take `finetune`, and so do weights to start from; nothing named is the small and quick net.
    """
    if data == "digits":
        return "digits"
    named = {"airbench": "fast", "net": "lecture", "net_res_deep": "lecture-resnet"}
    return named.get(model or "", "finetune" if model or has_weights else "fast")


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe of the package, or a TOML file, and applies the overrides.

    Raises:
        RecipeError: There is no such recipe, or a setting is unknown or out of range.
    """
    if name in names():
        text = (resources.files("training") / "recipes" / f"{name}.toml").read_text("utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text("utf-8")
    else:
        raise RecipeError(f"recipe: expected one of {', '.join(names())} or a file, got {name!r}")
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name}: {error}") from error
    return make_recipe({**settings, **(overrides or {})})


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Checks names and types, then values.

    Raises:
        RecipeError: A setting is unknown, of the wrong type or out of range.
    """
    hints = get_type_hints(Recipe)
    for name, value in settings.items():
        if name not in hints:
            known = ", ".join(f.name for f in fields(Recipe))
            raise RecipeError(f"recipe: unknown setting {name!r}; known are {known}")
        _check_type(name, value, hints[name])
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return Recipe(**values)


def parse_setting(text: str) -> tuple[str, Any]:
    """Reads `name=value`, where the value is TOML or else a plain string.

    Raises:
        RecipeError: There is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _check_type(name: str, value: object, hint: type | UnionType) -> None:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if choices:
        valid, expected = value in choices, f"one of {', '.join(choices)}"
    elif hint is float:
        valid, expected = type(value) in (int, float), "a number"
    elif get_origin(hint) is tuple:
        valid, expected = isinstance(value, list | tuple), "a list of numbers"
    else:
        plain = get_origin(hint) or hint
        valid, expected = type(value) is plain, getattr(plain, "__name__", str(plain))
    if not valid:
        raise RecipeError(f"{name}: expected {expected}, got {value!r}")
