"""What a run starts from: its net, and the folder that it makes or takes up."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from training import checkpoints, nets
from training.checkpoints import Architecture, Checkpoint, DataDescription
from training.data import Dataset, ImageFiles, ImageSet, Preprocessing
from training.distributed import Group
from training.errors import CheckpointError, RecipeError
from training.evaluate import predict
from training.inputs import Normalization
from training.loop import Trainer
from training.nets.airbench import AirbenchNet
from training.recipe import Recipe

_WHITENING_SAMPLES = 5000

AnyDataset = Dataset[ImageSet] | Dataset[ImageFiles]


def preprocessing(recipe: Recipe) -> Preprocessing:
    """How the recipe wants image files to be read."""
    size = recipe.image_size
    return Preprocessing(size, size, recipe.resize_shorter_px)


def make_net(
    recipe: Recipe, spec: str, data: AnyDataset, normalization: Normalization, weights: Path | None
) -> tuple[Checkpoint, nn.Module]:
    """The net, and the checkpoint that describes it before any training.

    Raises:
        CheckpointError: The weights cannot be read or do not fit.
        RecipeError: The backbone is to be frozen and there are no weights for it, or the images are
            to grow and the net takes one size only.
    """
    arguments = {
        **recipe.model_arguments,
        "n_classes": len(data.classes),
        "image_size": recipe.image_size,
    }
    net = nets.create(recipe.model, **arguments)
    if recipe.growth_share:
        _check_takes(net, recipe)
    if isinstance(net, AirbenchNet):
        count = min(len(data.train), _WHITENING_SAMPLES)
        net.whiten(normalization.apply(torch.from_numpy(data.train.read(range(count)))))
    if weights:
        _start_from(net, weights)
    if recipe.freeze_backbone:
        if not weights:
            raise RecipeError("freeze_backbone: expected --weights for what is frozen, got none")
        nets.freeze_backbone(net)
    description = DataDescription(
        spec, data.classes, normalization.mean, normalization.std, preprocessing(recipe)
    )
    architecture = Architecture(recipe.model, arguments)
    return Checkpoint(net.state_dict(), architecture, description, recipe=recipe.as_dict()), net


def _check_takes(net: nn.Module, recipe: Recipe) -> None:
    images = torch.zeros(1, 3, recipe.start_px, recipe.start_px)
    try:
        predict(net, [images])
    except RuntimeError as error:
        raise RecipeError(
            f"start_px: {recipe.model} takes no images of {recipe.start_px} px; "
            f"growth_share=0 trains at {recipe.image_size} px throughout"
        ) from error


def _start_from(net: nn.Module, path: Path) -> None:
    """Loads weights; those of a head with another number of classes are left out.

    Raises:
        CheckpointError: Anything but the last layer is missing, unknown or of another shape.
    """
    weights, own = checkpoints.read_weights(path), net.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    head = nets.head_of(net)
    different = sorted(k for k in own.keys() ^ fitting.keys() if not k.startswith(f"{head}."))
    different += sorted(weights.keys() - own.keys())
    if different:
        shown = ", ".join(different[:5])
        raise CheckpointError(f"weights {path}: expected all but {head}.* to fit, not {shown}")
    net.load_state_dict(fitting, strict=False)


def prepare_folder(
    out: Path, trainer: Trainer, template: Checkpoint, resume: bool, group: Group
) -> None:
    """Makes the folder of the run, or brings the trainer to where its last.pt was.

    Raises:
        CheckpointError: The folder or its last.pt is unusable.
        RecipeError: The run to resume had other settings.
    """
    state = _open_folder(out, trainer, template, resume) if group.is_first else None
    state = group.from_first(state)
    if state is not None:
        trainer.load_state_dict(state)


def _open_folder(
    out: Path, trainer: Trainer, template: Checkpoint, resume: bool
) -> dict[str, object] | None:
    """Returns the training state of the run to resume."""
    last, state = out / "last.pt", None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resume and last.exists():
            _check_same_run(checkpoints.load(last), template)
            state = checkpoints.load_training_state(last)
        else:
            (out / "best.pt").unlink(missing_ok=True)
            checkpoints.save(last, template, trainer.state_dict())
        _write_config(out / "config.json", template)
    except OSError as error:
        raise CheckpointError(f"out: cannot write to {out}: {error.strerror}") from error
    return state


def _write_config(path: Path, template: Checkpoint) -> None:
    config = {
        "data": template.data.spec,
        "device": str(next(iter(template.state_dict.values())).device),
        "recipe": dict(template.recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _check_same_run(last: Checkpoint, template: Checkpoint) -> None:
    if (last.architecture, last.data) != (template.architecture, template.data):
        raise RecipeError("resume: expected the data and model of last.pt, got others")
    changed = [k for k, v in template.recipe.items() if last.recipe.get(k) != v]
    if changed:
        raise RecipeError(f"resume: expected the recipe of last.pt, got another {changed[0]}")
