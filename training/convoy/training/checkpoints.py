"""Checkpoints: one file with a state_dict and everything needed to use it.

The file is a dict of tensors, strings, numbers, lists and dicts, so `torch.load` opens it with
`weights_only=True`. It records architecture and data, so that nets with equal keys and different
meanings (the lecture's shared and unshared blocks) are never mixed up.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convoy.training import nets
from convoy.training.data import Preprocessing, Shares
from convoy.training.errors import CheckpointError, NetError
from convoy.training.nets.factories import is_factory, source_digest
from convoy.training.weights import load_into, load_plain, strip_prefixes

FORMAT = "convoy-checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """A net's name and arguments.

    Attributes:
        source_sha256: Of the file of the user's factory; empty for other names.
    """

    name: str
    arguments: Mapping[str, object]
    source_sha256: str = ""


@dataclass(frozen=True, slots=True)
class DataDescription:
    """The data of the training.

    Attributes:
        spec: As for `convoy.training.data.load_data`.
        classes: In the order of the logits.
        mean: Per channel, of pixels scaled to 0..1.
        std: Per channel; the standard deviation over pixels.
        preprocessing: Size and filter of the inputs.
        shares: What was held out where the data has no such split.
    """

    spec: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    preprocessing: Preprocessing
    shares: Shares = field(default_factory=Shares)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained net.

    Attributes:
        state_dict: Its weights and buffers, on the CPU when loaded.
        architecture: Of the net.
        data: Of the training.
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

    def build_net(self, model: str | None = None) -> nn.Module:
        """Return the net with these weights, in evaluation mode.

        Args:
            model: Name of the user's factory, if the net was made by one: a checkpoint alone
                never runs code.

        Raises:
            CheckpointError: The weights do not fit the architecture, or the model differs from the
                checkpoint's.
        """
        self._check_model(model)
        try:
            net = nets.create(self.architecture.name, **self.architecture.arguments)
        except NetError as error:
            raise CheckpointError(f"checkpoint: {error}") from error
        load_into(net, self.state_dict, "checkpoint")
        return net.eval()

    def _check_model(self, model: str | None) -> None:
        name = self.architecture.name
        if model is not None and model != name:
            raise CheckpointError(f"model: expected {name}, as in the training, got {model}")
        if not is_factory(name):
            return
        if model is None:
            raise CheckpointError(
                f"checkpoint: {name} creates its net, and runs only if you name it; "
                f"add --model {name}"
            )
        found = source_digest(name)
        if found != self.architecture.source_sha256:
            raise CheckpointError(
                f"model {name}: expected the source of the training, SHA-256 "
                f"{self.architecture.source_sha256[:12]}…, got {found[:12]}…; "
                "`convoy-export module` accepts the weights with any source"
            )


def save(
    path: Path, checkpoint: Checkpoint, training_state: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint atomically: the file is either the old one or the complete new one.

    Args:
        path: The file.
        checkpoint: Its content.
        training_state: State for resuming (optimizer, scheduler, random states).

    Raises:
        CheckpointError: It cannot be written, for example because the disk is full; the previous
            file is unchanged.
    """
    data = asdict(checkpoint.data)
    # Omitted if they are empty, so that earlier releases read the checkpoint.
    if data["preprocessing"]["antialias"]:
        del data["preprocessing"]["antialias"]
    if data["preprocessing"]["decode"] == "exact":
        del data["preprocessing"]["decode"]
    if checkpoint.data.shares == Shares():
        del data["shares"]
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state_dict": dict(checkpoint.state_dict),
        "architecture": {
            "name": checkpoint.architecture.name,
            "arguments": dict(checkpoint.architecture.arguments),
            # Omitted for other nets, so that older releases read the checkpoint.
            **(
                {"source_sha256": digest}
                if (digest := checkpoint.architecture.source_sha256)
                else {}
            ),
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
    """Read a checkpoint onto the CPU; never runs code from the file.

    Raises:
        CheckpointError: The file is missing, damaged, or not a checkpoint of this project.
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
                shares=Shares(**data.get("shares", {})),
            ),
            metrics=content["metrics"],
            temperature=content["temperature"],
            recipe=content.get("recipe", {}),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the checkpoint lacks {error}") from error


def load_training_state(path: Path) -> dict[str, Any]:
    """Read the `training_state` of `save`.

    Raises:
        CheckpointError: As `load`, or the checkpoint was written without it.
    """
    state = _read(path).get("training_state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a training state, as last.pt has")
    return state


def _read(path: Path) -> dict[str, Any]:
    content = load_plain(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of convoy-train")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, "
            f"got {content.get('format_version')!r}"
        )
    return content
