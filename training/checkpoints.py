"""What training keeps: a state_dict with everything needed to use it, in one plain file.

The file is a dict of tensors, strings, numbers, lists and dicts, so `torch.load` opens it with
`weights_only=True`. Architecture and data travel with the weights: nets whose keys agree but whose
meaning differs (the lecture's shared and unshared blocks) never load into each other in silence.
"""

import contextlib
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import nets
from training.data import Preprocessing
from training.errors import CheckpointError, NetError

FORMAT = "convoy-checkpoint"
FORMAT_VERSION = 1

_WRAPPER_PREFIXES = ("_orig_mod.", "module.")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A net's name and the arguments it was made with."""

    name: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class DataDescription:
    """What the net was trained on.

    Attributes:
        spec: As `training.data.load_data` takes it.
        classes: In the order of the logits.
        mean: Per channel, of pixels scaled to 0..1.
        std: Per channel, likewise; the per-pixel standard deviation.
        preprocessing: How image files become inputs.
    """

    spec: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained net.

    Attributes:
        state_dict: Its weights and buffers, on the CPU when loaded.
        architecture: What they belong to.
        data: What they were learned from.
        metrics: E.g. "epoch", "valid_loss", "valid_accuracy", "test_accuracy" (0 to 1).
        temperature: probabilities = softmax(logits / temperature).
        recipe: The resolved settings of the run.
    """

    state_dict: Mapping[str, Tensor]
    architecture: Architecture
    data: DataDescription
    metrics: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def build_net(self) -> nn.Module:
        """Makes the net with these weights, in evaluation mode.

        Raises:
            CheckpointError: The weights do not fit the architecture.
        """
        try:
            net = nets.create(self.architecture.name, **self.architecture.arguments)
            net.load_state_dict(self.state_dict, strict=True)
        except (NetError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint: {reason}") from error
        return net.eval()


def save(
    path: Path, checkpoint: Checkpoint, training_state: Mapping[str, Any] | None = None
) -> None:
    """Writes a checkpoint atomically: the file is either the old one or the whole new one.

    Args:
        path: Where to write it.
        checkpoint: What to keep.
        training_state: What a resumed run needs beside it (optimizer, scheduler, random states).

    Raises:
        CheckpointError: It cannot be written, for example because the disk is full; what was at
            `path` before is still there.
    """
    data = asdict(checkpoint.data)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state_dict": dict(checkpoint.state_dict),
        "architecture": {
            "name": checkpoint.architecture.name,
            "arguments": dict(checkpoint.architecture.arguments),
        },
        "data": {
            **data,
            "classes": list(data["classes"]),
            "mean": list(data["mean"]),
            "std": list(data["std"]),
        },
        "metrics": dict(checkpoint.metrics),
        "temperature": checkpoint.temperature,
        "recipe": dict(checkpoint.recipe),
    }
    if training_state is not None:
        content["training_state"] = dict(training_state)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    # PyTorch's zip writer reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; never runs code from the file.

    Raises:
        CheckpointError: The file is missing, damaged, or no checkpoint of this project.
    """
    content = _read(path)
    try:
        data = dict(content["data"])
        return Checkpoint(
            state_dict=strip_prefixes(content["state_dict"]),
            architecture=Architecture(**content["architecture"]),
            data=DataDescription(
                spec=data["spec"],
                classes=tuple(data["classes"]),
                mean=tuple(data["mean"]),
                std=tuple(data["std"]),
                preprocessing=Preprocessing(**data["preprocessing"]),
            ),
            metrics=content["metrics"],
            temperature=content["temperature"],
            recipe=content.get("recipe", {}),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the checkpoint lacks {error}") from error


def load_training_state(path: Path) -> dict[str, Any]:
    """Reads what `save` was given as `training_state`.

    Raises:
        CheckpointError: As `load`, or the checkpoint was written without it.
    """
    state = _read(path).get("training_state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a training state, as last.pt has")
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state_dict from a .safetensors file, a checkpoint, or a bare `torch.save`.

    Raises:
        CheckpointError: The file is missing, damaged, or holds no state_dict.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return strip_prefixes(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    content = _torch_load(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(f"{path}: expected a state_dict of tensors")
    return strip_prefixes(weights)


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes what DistributedDataParallel and torch.compile put before every name."""
    weights = dict(state_dict)
    # Twice, since either wrapper may be the outer one.
    for prefix in _WRAPPER_PREFIXES * 2:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _read(path: Path) -> dict[str, Any]:
    content = _torch_load(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of convoy-train")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, "
            f"got {content.get('format_version')!r}"
        )
    return content


def _torch_load(path: Path) -> object:
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint of convoy-train") from error
    return content
