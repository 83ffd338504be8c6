"""What is exported: a net in eval mode with everything its graph and manifest have to say."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from export.errors import InputError, one_line
from training import checkpoints
from training.checkpoints import DataDescription
from training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A trained net and where it comes from.

    Attributes:
        net: Eager, float32, in eval mode: normalised `[N, 3, H, W]` to logits `[N, K]`.
        data: What it was trained on and how its images are prepared.
        temperature: What the logits are divided by before softmax.
        checkpoint_sha256: Lower-case hexadecimal.
        architecture_arguments: Values that JSON can hold.
        accuracy: Accuracy at training time, 0 to 1, by split ("valid", "test").
    """

    net: nn.Module
    data: DataDescription
    temperature: float
    checkpoint_sha256: str
    architecture: str
    architecture_arguments: Mapping[str, object]
    accuracy: Mapping[str, float]

    @property
    def parameters(self) -> int:
        """How many numbers were learnt, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def describe(self, name: str) -> dict[str, str]:
        """Returns what travels inside each artefact, as strings of text or JSON."""
        size = self.data.preprocessing
        return {
            "name": name,
            "labels": json.dumps(list(self.data.classes)),
            "input_layout": f"uint8 [N, {size.height_px}, {size.width_px}, 3], RGB",
            "mean": json.dumps(list(self.data.mean)),
            "std": json.dumps(list(self.data.std)),
            "temperature": json.dumps(self.temperature),
            "architecture": self.architecture,
            "checkpoint_sha256": self.checkpoint_sha256,
            "accuracy": json.dumps(dict(self.accuracy)),
            "producer": producer(),
        }


def producer() -> str:
    """Returns what exports, with the versions of what it exports by."""
    names = ("convoy-serving", "torch", "onnx")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def from_checkpoint(path: Path) -> ModelSource:
    """Reads a checkpoint of `training`.

    Raises:
        InputError: The file is missing, unreadable or no checkpoint.
    """
    try:
        checkpoint = checkpoints.load(path)
        net = checkpoint.build_net()
        digest = _digest(path)
    except (TrainingError, OSError) as error:
        raise InputError(one_line(error)) from error
    return ModelSource(
        net=net,
        data=checkpoint.data,
        temperature=checkpoint.temperature,
        checkpoint_sha256=digest,
        architecture=checkpoint.architecture.name,
        architecture_arguments=checkpoint.architecture.arguments,
        accuracy={
            key.removesuffix("_accuracy"): float(value)
            for key, value in checkpoint.metrics.items()
            if key.endswith("_accuracy")
        },
    )


def from_weights(
    path: Path, architecture: str, arguments: Mapping[str, object], data: DataDescription
) -> ModelSource:
    """Reads a state_dict that something else than `training` saved, by torch or as safetensors.

    Args:
        path: The file; safetensors by its suffix.
        architecture: One of the names that `training.nets` knows, torchvision's among them.
        arguments: What that net is made with.
        data: What the file cannot say: classes, normalisation and preprocessing.

    Raises:
        InputError: The file is unreadable, or its weights do not fit the architecture.
    """
    try:
        weights = checkpoints.read_weights(path)
        parts = checkpoints.Architecture(architecture, dict(arguments))
        net = checkpoints.Checkpoint(weights, parts, data, metrics={}).build_net()
        digest = _digest(path)
    except (TrainingError, OSError) as error:
        raise InputError(one_line(error)) from error
    return ModelSource(net, data, 1.0, digest, architecture, arguments, accuracy={})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
