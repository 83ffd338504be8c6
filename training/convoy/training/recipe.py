"""The settings of a training: one frozen object, from TOML and flags, saved in checkpoints."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from convoy.training.errors import RecipeError

_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("image_size", "start_px", "epochs", "batch_size", "lr", "muon_lr", "accumulate"),
        lambda value: value > 0,
        "more than 0",
    ),
    (
        (
            *("warmup_share", "growth_share", "label_smoothing"),
            *("momentum", "muon_momentum", "ema_decay", "random_erasing"),
        ),
        lambda value: 0 <= value < 1,
        "0 <= x < 1",
    ),
    (("valid_share", "test_share"), lambda value: 0 < value < 1, "0 < x < 1"),
    (("layer_decay",), lambda value: 0 < value <= 1, "0 < x <= 1"),
    (
        (
            *("weight_decay", "l1", "l2", "shift_px", "cutout_px", "clip_norm", "patience"),
            *("color_jitter", "mixup_alpha", "cutmix_alpha"),
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
)
"""Settings, the condition for each, and its text in messages."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every setting that changes the trained weights.

    Attributes:
        model: A name for `nets.create`.
        model_arguments: Arguments of the net besides classes and image size.
        image_size: Height and width of the input in pixels.
        resize_shorter_px: Shorter side before the center crop; 0 resizes straight to image_size.
        interpolation: Filter that images are resized with.
        antialias: Average all pixels that a smaller one covers; false interpolates at points, as
            OpenCV does.
        decode: `exact` decodes all pixels; `scaled` decodes JPEGs at the smallest of 1/8, 1/4, 1/2
            and 1 of their size that is not below the size they are resized to.
        valid_share: Share of each class that is held out to validate, where the data has no
            validation images of its own.
        test_share: Likewise to test.
        mean: Subtracted per channel from pixels in 0..1; empty measures it on the training set.
        std: Divided by, per channel; empty measures it likewise.
        epochs: Passes over the training set.
        batch_size: Images per step.
        optimizer: `sgd` (with Nesterov's momentum if momentum > 0), `adamw`, or `muon`, which is
            sgd except for the kernels of convolutions.
        lr: Peak learning rate, for a loss that is the mean of its batch.
        momentum: Of `sgd` and `muon`.
        muon_lr: Peak learning rate of the kernels with `muon`.
        muon_momentum: Momentum of the kernels with `muon`.
        weight_decay: Added to the gradient as weight_decay * p (sgd), or decoupled (adamw).
        decay_all: Decay biases and norm parameters as well, as the lecture does.
        norm_bias_lr_factor: Multiplies the rate of the norms' biases (Jordan, 2024).
        l1: Penalty l1 * sum(abs(p)), added to the loss.
        l2: Penalty l2 * sum(p ** 2); for sgd the same as weight_decay = 2 * l2.
        schedule: Of the learning rate, see `schedules`; `plateau` follows the validation
            loss.
        warmup_share: Share of all steps in which the rate climbs to lr.
        label_smoothing: Share of the target that is spread evenly over all classes.
        growth_share: Share of all steps in which the training images grow to image_size.
        start_px: Their initial height and width.
        flip: Mirror each image at random, or `alternating` from epoch to epoch.
        shift_px: Largest shift of an image, in pixels, with reflected borders.
        cutout_px: Side of a square of mean color put over each image; 0 for none.
        crop: `random_resized` cuts a random part of each image at a random scale and aspect ratio
            and resizes that; `center` takes the validation's pixels.
        crop_scale: Smallest and largest share of an image that such a part covers.
        auto_augment: torchvision's TrivialAugmentWide or RandAugment on each image, or none.
        color_jitter: Largest change of brightness, contrast and saturation, as a share.
        random_erasing: Share of the images that have a random rectangle erased.
        mixup_alpha: Mixes pairs of images and labels (Zhang et al., 2018); 0 for none.
        cutmix_alpha: Puts a part of one image into another (Yun et al., 2019); 0 for none. Where
            both are given each batch takes one of them.
        balance: Even out classes of different sizes: `weights` weighs the loss of each image by
            1 / size of its class, `sampling` draws images of all classes equally often.
        accumulate: Batches whose gradients are added up for one step.
        layer_decay: Multiplies the rate once for each layer between a parameter and the head.
        average: What is evaluated and kept: the weights, their moving average, or Lookahead's.
        ema_decay: Of `ema`, a step.
        clip_norm: Largest norm of the gradient; 0 does not clip.
        freeze_backbone: Train the head alone; everything before it keeps its weights and its batch
            norm's statistics.
        precision: Of the training step; `auto` is bfloat16 on a GPU that has it and on a CPU with
            AMX, and float32 elsewhere and for nets that a CPU cannot train in bfloat16. Evaluation
            is in float32.
        compile: Compile the training step with torch.compile.
        patience: Epochs without a better validation loss before the run stops; 0: no limit.
        seed: Equal seeds give bit-equal weights on a CPU.
    """

    model: str = "net_res_deep"
    model_arguments: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    resize_shorter_px: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    decode: Literal["exact", "scaled"] = "exact"
    valid_share: float = 0.1
    test_share: float = 0.1
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
    crop: Literal["center", "random_resized"] = "center"
    crop_scale: tuple[float, ...] = (0.35, 1.0)
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    balance: Literal["none", "weights", "sampling"] = "none"
    accumulate: int = 1
    layer_decay: float = 1.0
    average: Literal["none", "ema", "lookahead"] = "none"
    ema_decay: float = 0.999
    clip_norm: float = 0.0
    freeze_backbone: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for names, holds, expected in _RANGES:
            for name in names:
                value = getattr(self, name)
                if not holds(value):
                    raise RecipeError(f"{name}: expected {expected}, got {value}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        if not self.antialias and self.interpolation != "bilinear":
            raise RecipeError("antialias: false is for interpolation bilinear only")
        if not self.antialias and self.decode == "scaled":
            raise RecipeError("antialias: expected true with decode scaled, got false")
        if 0 < self.resize_shorter_px < self.image_size:
            raise RecipeError(
                f"resize_shorter_px: expected 0 or at least image_size ({self.image_size}), got "
                f"{self.resize_shorter_px}: the crop would have a black border"
            )
        if self.shift_px >= self.image_size:
            raise RecipeError(f"shift_px: expected less than image_size, got {self.shift_px}")
        if self.growth_share and self.start_px > self.image_size:
            raise RecipeError(f"start_px: expected at most image_size, got {self.start_px}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise RecipeError(
                f"crop_scale: expected two shares, 0 < a <= b <= 1, got {list(self.crop_scale)}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise RecipeError(f"{name}: expected 3 numbers or none, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """Return strings, numbers, lists and dicts only, for TOML, JSON and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def names() -> tuple[str, ...]:
    """Return the names of the built-in recipes."""
    folder = resources.files("convoy.training") / "recipes"
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir()))


def default_for(data: str, model: str | None = None, has_weights: bool = False) -> str:
    """Return the default recipe of a run.

    The digits have their own. Otherwise our nets use the recipe made for them, torchvision's nets
    and given weights use `finetune`, and all else uses `fast`.
    """
    if data == "digits":
        return "digits"
    named = {"airbench": "fast", "net": "lecture", "net_res_deep": "lecture-resnet"}
    return named.get(model or "", "finetune" if model or has_weights else "fast")


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a built-in recipe or a TOML file, and apply the overrides.

    Raises:
        RecipeError: The recipe is missing, or a setting is unknown or out of range.
    """
    if name in names():
        text = (resources.files("convoy.training") / "recipes" / f"{name}.toml").read_text("utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text("utf-8")
    else:
        raise RecipeError(f"recipe: expected one of {', '.join(names())} or a file, got {name!r}")
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name}: {error}") from error
    return make_recipe({**settings, **_sized(settings, overrides or {})})


def _sized(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides in which the shorter side before the crop scales with the image size."""
    size, base = overrides.get("image_size"), settings.get("image_size")
    resize = settings.get("resize_shorter_px")
    if not (type(size) is int and base and resize) or "resize_shorter_px" in overrides:
        return dict(overrides)
    return {**overrides, "resize_shorter_px": round(resize * size / base)}


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Check names and types, then values.

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
    """Read `name=value`, where the value is TOML or else a plain string.

    Raises:
        RecipeError: The `=` is missing.
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
