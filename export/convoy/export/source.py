"""The source of an export: a net in eval mode with the content of its graph and manifest."""

import hashlib
import importlib.metadata
import io
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from convoy.export.description import InputDescription
from convoy.export.errors import InputError, one_line
from convoy.export.formats import ArtifactFormat, ChannelOrder, OutputKind, Precision
from convoy.training import checkpoints, nets
from convoy.training.checkpoints import DataDescription
from convoy.training.errors import TrainingError
from convoy.training.nets.factories import timm_input
from convoy.training.weights import WeightsOptions, load_into, read_weights

_LEAST_STD = 1e-3
"""Less than 1/255, the std of nets for pixels from 0 to 255."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A trained net and its origin.

    Attributes:
        net: Eager, float32, in eval mode: normalized `[N, C, H, W]` to `[N, K]`, where C is 3, or 1
            of a gray net.
        data: What it was trained on and how its images are prepared.
        temperature: The divisor of the logits before the softmax.
        checkpoint_sha256: Lower-case hexadecimal.
        architecture_arguments: Values that JSON can hold.
        accuracy: Accuracy at training time, 0 to 1, by split ("valid", "test").
        output: The kind of the net's output.
        channel_order: The channels of the net's input. Mean and std are of red, green and blue in
            any case; for GRAY all three are equal.
        precision: Of the net's own weights.
        formats: Supported formats.
    """

    net: nn.Module
    data: DataDescription
    temperature: float
    checkpoint_sha256: str
    architecture: str
    architecture_arguments: Mapping[str, object]
    accuracy: Mapping[str, float]
    output: OutputKind = OutputKind.LOGITS
    channel_order: ChannelOrder = ChannelOrder.RGB
    precision: Precision = Precision.FP32
    formats: tuple[ArtifactFormat, ...] = tuple(ArtifactFormat)

    @property
    def parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def describe(self, name: str) -> dict[str, str]:
        """Return the metadata of each artifact, as text or JSON strings."""
        size = self.data.preprocessing
        return {
            "name": name,
            "labels": json.dumps(list(self.data.classes)),
            "input_layout": f"uint8 [N, {size.height_px}, {size.width_px}, 3], RGB",
            "mean": json.dumps(list(self.data.mean)),
            "std": json.dumps(list(self.data.std)),
            "channel_order": self.channel_order.value,
            "output": self.output.value,
            "temperature": json.dumps(self.temperature),
            "architecture": self.architecture,
            "checkpoint_sha256": self.checkpoint_sha256,
            "accuracy": json.dumps(dict(self.accuracy)),
            "producer": producer(),
        }


def check_source(source: ModelSource) -> None:
    """Check for values that a server would reject or that cannot be right.

    Raises:
        InputError: The message names the field.
    """
    data, size = source.data, source.data.preprocessing
    check_normalization(data.mean, data.std)
    if source.channel_order is ChannelOrder.GRAY:
        _check_gray(data)
    if not data.classes:
        raise InputError("labels: expected at least one class name, found none")
    if min(size.height_px, size.width_px) < 1:
        raise InputError(
            f"image_size_px: expected at least 1, got {size.height_px} x {size.width_px}"
        )
    if not size.antialias and size.interpolation != "bilinear":
        raise InputError(
            f"interpolation: expected bilinear with --no-antialias, got {size.interpolation}"
        )
    if not size.antialias and size.decode == "scaled":
        raise InputError("decode: expected exact with --no-antialias, got scaled")
    larger_px = max(size.height_px, size.width_px)
    if size.resize_shorter_px and size.resize_shorter_px < larger_px:
        raise InputError(
            f"resize_shorter_px: expected 0 or at least the crop's larger side ({larger_px}), "
            f"got {size.resize_shorter_px}"
        )


def _check_gray(data: DataDescription) -> None:
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(set(values)) != 1:
            raise InputError(
                f"{name}: expected one number three times for a net of one gray channel, got "
                f"{' '.join(f'{value:g}' for value in values)}"
            )


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Check that mean and std are for pixels from 0 to 1.

    Raises:
        InputError: They are not finite, negative, or for pixels from 0 to 255.
    """
    for name, values, least in (("mean", mean, 0.0), ("std", std, _LEAST_STD)):
        if len(values) != 3:
            raise InputError(f"{name}: expected 3 numbers, got {len(values)}")
        for value in values:
            if not math.isfinite(value) or not least <= value <= 1:
                hint = "; divide it by 255" if 1 < value <= 255 else ""
                raise InputError(
                    f"{name}: expected numbers from {least:g} to 1, as for pixels from 0 to 1, "
                    f"got {value:g}{hint}"
                )


def producer() -> str:
    """Return the versions of the exporting package and its libraries."""
    names = ("convoy-serving", "torch", "onnx")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def from_checkpoint(path: Path, model: str | None = None) -> ModelSource:
    """Read a checkpoint of `training`.

    Args:
        path: The file.
        model: The factory of the net, if it is the user's own code.

    Raises:
        InputError: The file is missing, unreadable or not a checkpoint, or the model differs.
    """
    try:
        checkpoint = checkpoints.load(path)
        net = checkpoint.build_net(model)
        digest = digest_of_file(path)
    except (TrainingError, OSError) as error:
        raise InputError(one_line(error)) from error
    return ModelSource(
        net=net,
        data=checkpoint.data,
        temperature=checkpoint.temperature,
        checkpoint_sha256=digest,
        architecture=published_name(checkpoint.architecture.name),
        architecture_arguments=checkpoint.architecture.arguments,
        accuracy={
            key.removesuffix("_accuracy"): float(value)
            for key, value in checkpoint.metrics.items()
            if key.endswith("_accuracy")
        },
    )


def from_weights(
    path: Path | None,
    architecture: str,
    arguments: Mapping[str, object],
    description: InputDescription,
    options: WeightsOptions | None = None,
) -> ModelSource:
    """Make a net by name, with weights that another program saved.

    Args:
        path: A state_dict by torch or as safetensors; None keeps the initial weights of the net.
        architecture: A name that `convoy.training.nets` knows, or a factory in the user's own code.
        arguments: Arguments of the net.
        description: Classes, normalization and preprocessing, which the file does not contain.
        options: Where the weights are in the file.

    Raises:
        InputError: The file is unreadable, its weights do not fit the architecture, or
            information about the input is missing.
    """
    data = description.complete()
    if nets.accepts(architecture, "n_classes"):
        arguments = {"n_classes": len(data.classes), **arguments}
    if nets.accepts(architecture, "image_size"):
        arguments = {"image_size": data.preprocessing.height_px, **arguments}
    try:
        net = nets.create(architecture, **arguments)
        if path:
            load_into(net, read_weights(path, options), str(path))
        digest = digest_of_file(path) if path else digest_of_weights(net)
    except (TrainingError, OSError) as error:
        raise InputError(one_line(error)) from error
    name = published_name(architecture)
    return from_net(net, data, description, digest, name, **arguments)


def describe_timm(name: str, image_size_px: tuple[int, int] | None) -> InputDescription:
    """Return the published mean, std and preprocessing of a timm net.

    Raises:
        InputError: timm is not installed, or does not know the name.
    """
    try:
        found = timm_input(name, image_size_px[0] if image_size_px else None)
    except TrainingError as error:
        raise InputError(one_line(error)) from error
    steps = found.preprocessing
    return InputDescription(
        mean=found.mean,
        std=found.std,
        image_size_px=(steps.height_px, steps.width_px),
        resize_shorter_px=steps.resize_shorter_px,
        interpolation=steps.interpolation,
    )


def parse_arguments(settings: Sequence[str]) -> dict[str, object]:
    """Read NAME=VALUE, where the value is TOML or else a plain string.

    Raises:
        InputError: The `=` is missing.
    """
    arguments: dict[str, object] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set: expected NAME=VALUE, got {text!r}")
        try:
            arguments[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            arguments[name] = value
    return arguments


def published_name(architecture: str) -> str:
    """Return an architecture's name for artifacts: a factory's file without its folder."""
    place, colon, factory = architecture.rpartition(":")
    return f"{Path(place).name}:{factory}" if colon and place.endswith(".py") else architecture


def from_net(
    net: nn.Module,
    data: DataDescription,
    description: InputDescription,
    digest: str,
    architecture: str,
    **arguments: object,
) -> ModelSource:
    """Make a source of a net in memory, which is put into eval mode."""
    return ModelSource(
        net.eval(),
        data,
        1.0,
        digest,
        architecture,
        arguments,
        accuracy={},
        output=description.output or OutputKind.LOGITS,
        channel_order=description.channel_order or ChannelOrder.RGB,
    )


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_weights(net: nn.Module) -> str:
    """Return the SHA-256 of a net's weights, as torch.save writes them."""
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()
