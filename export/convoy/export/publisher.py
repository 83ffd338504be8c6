"""Publishing in one call, for the command line and `convoy.export.publish`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

from torch import nn

from convoy.export.cost import count_multiply_adds
from convoy.export.description import InputDescription, triple
from convoy.export.errors import InputError, runtime_reason
from convoy.export.formats import (
    ArtifactFormat,
    ChannelOrder,
    OutputKind,
    Precision,
    choose_variants,
)
from convoy.export.pipeline import ExportOptions, Published, export
from convoy.export.repository import Model, model_in
from convoy.export.samples import (
    MAX_REAL_SAMPLES,
    Samples,
    generate_samples,
    load_samples,
    read_images,
)
from convoy.export.signing import read_private_key
from convoy.export.source import ModelSource, check_source, digest_of_weights, from_net
from convoy.training.data.images import Decode, Interpolation

_log = logging.getLogger(__name__)

_PROOF_MULTIPLY_ADDS = 400_000_000_000
"""Largest cost of one pass over the samples: about 20 s on a processor of 2020."""
_Kind = TypeVar("_Kind", bound=Enum)
_DEFAULT_FORMATS = (ArtifactFormat.ONNX, ArtifactFormat.TORCHSCRIPT)
_FEWEST_SAMPLES = 64
"""One batch of the largest size."""


@dataclass(frozen=True, slots=True)
class Order:
    """The artifacts to write, their target, and the images for the proof.

    Attributes:
        target: Where the version goes.
        formats: One artifact of each; by default ONNX and TorchScript, if the net supports them.
        precisions: Further precisions.
        script: TorchScript from source code in place of a trace.
        abstain_below: See `ExportOptions`.
        sign_key: Path of an Ed25519 key.
        data: Labeled data as `training` names it; it adds accuracy to the proof.
        images: Folder of images to prove the artifacts on.
        samples: How many images to prove on at most; None takes fewer for nets that take long.
        openvino: Prove ONNX artifacts in OpenVINO too; None does so where it is installed.
            Its failure ends the export for what formats and precisions name.
        progress: Called with each step.
    """

    target: Model
    formats: Sequence[ArtifactFormat] = ()
    precisions: Sequence[Precision] = ()
    script: bool = False
    abstain_below: float = 0.0
    sign_key: Path | None = None
    data: str | None = None
    images: Path | None = None
    samples: int | None = None
    openvino: bool | None = None
    progress: Callable[[str], None] = lambda step: None


def publish_source(source: ModelSource, order: Order) -> Published:
    """Publish a source as the next version of a model.

    Raises:
        ExportError: The message is one line; nothing was published.
    """
    check_source(source)
    key = read_private_key(order.sign_key) if order.sign_key else None
    formats = _choose_formats(source, order.formats)
    variants = choose_variants(formats, order.precisions, source.precision)
    samples = _find_samples(source, order)
    options = ExportOptions(
        variants,
        order.script,
        order.abstain_below,
        key,
        order.openvino,
        [v for v in variants if v.format in order.formats or v.precision in order.precisions],
        order.progress,
    )
    return export(source, samples, order.target, options)


def _choose_formats(
    source: ModelSource, wanted: Sequence[ArtifactFormat]
) -> Sequence[ArtifactFormat]:
    """Return the formats to write.

    Raises:
        InputError: The source does not support a requested format.
    """
    for form in wanted:
        if form not in source.formats:
            able = ", ".join(each.value for each in source.formats)
            raise InputError(
                f"format: expected {able} for a model of {source.architecture}, got {form.value}"
            )
    defaults = [form for form in _DEFAULT_FORMATS if form in source.formats]
    return wanted or defaults or source.formats[:1]


def _find_samples(source: ModelSource, order: Order) -> Samples:
    if order.data and order.images:
        raise InputError("data, images: expected one of them, got both")
    classes, size = source.data.classes, source.data.preprocessing
    limit = order.samples or _affordable_samples(source)
    order.progress("loading the images of the proof")
    if order.data:
        ours = order.data == source.data.spec
        return load_samples(order.data, classes, size, limit, source.data.shares if ours else None)
    if order.images:
        return read_images(order.images, classes, size, limit)
    _log.warning(
        "neither --data nor --images: the proof runs on generated images and measures no accuracy"
    )
    return generate_samples(size)


def _affordable_samples(source: ModelSource) -> int:
    size = source.data.preprocessing
    try:
        multiply_adds = count_multiply_adds(
            source.net, size.height_px, size.width_px, source.channel_order.channels
        )
    # What a net throws depends on its code.
    except Exception as error:
        raise InputError(
            f"{source.architecture}: the net fails on an image of {size.height_px} x "
            f"{size.width_px} px: {runtime_reason(error)}"
        ) from error
    affordable = _PROOF_MULTIPLY_ADDS // max(1, multiply_adds)
    return max(_FEWEST_SAMPLES, min(MAX_REAL_SAMPLES, affordable))


def publish(
    net: nn.Module,
    *,
    name: str,
    labels: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size_px: int | tuple[int, int] = 224,
    resize_shorter_px: int = 0,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    decode: Decode = "exact",
    channel_order: str = "rgb",
    output: str = "logits",
    repository: str | Path = "models",
    formats: Sequence[str] = (),
    precisions: Sequence[str] = (),
    data: str | None = None,
    images: str | Path | None = None,
    samples: int | None = None,
    architecture: str | None = None,
    arguments: Mapping[str, object] | None = None,
) -> Published:
    """Publish your own net as the next version of a model, with every artifact verified.

    Args:
        net: Maps normalized float32 `[N, 3, H, W]`, or `[N, 1, H, W]` of gray, to `[N, K]`. It is
            put into eval mode.
        name: Name the model is served under.
        labels: K class names in the order of the net's outputs.
        mean: Of red, green and blue, for pixels from 0 to 1.
        std: The same; a pixel becomes (x - mean) / std.
        image_size_px: Side of a square input, or (height, width).
        resize_shorter_px: Shorter side before the center crop; 0 resizes without cropping.
        interpolation: "bilinear" or "bicubic".
        antialias: Shrink images by averaging, as Pillow does; False interpolates at points, as
            OpenCV does.
        decode: "exact" decodes all pixels of a file; "scaled" decodes large JPEGs at a fraction of
            their size.
        channel_order: "rgb", "bgr" or "gray" (one channel), what the net takes.
        output: What the net's output is: "logits", "probabilities" (it ends in a softmax) or
            "sigmoid" (it ends in a sigmoid for each class).
        repository: The model repository: a folder, or a URL in an object store.
        formats: Artifacts to write: "onnx", "torchscript", "exported-program", "aot-inductor"; by
            default the first two.
        precisions: Further artifacts in "fp16", "bf16" or "int8".
        data: Labeled data to prove the artifacts on, as `convoy-train --data` names it.
        images: Folder of images to prove them on, instead.
        samples: How many images to prove on at most.
        architecture: What the manifest calls the net; by default its class.
        arguments: What it was made with, for the manifest; values that JSON can hold.

    Returns:
        The version: its folder, manifest and parities.

    Raises:
        convoy.export.errors.ExportError: The message is one line; nothing was published.
    """
    height_px, width_px = (
        (image_size_px, image_size_px) if isinstance(image_size_px, int) else image_size_px
    )
    described = InputDescription(
        labels=tuple(labels),
        mean=triple("mean", mean),
        std=triple("std", std),
        image_size_px=(height_px, width_px),
        resize_shorter_px=resize_shorter_px,
        interpolation=interpolation,
        antialias=antialias,
        decode=decode,
        output=_value_of(OutputKind, "output", output),
        channel_order=_value_of(ChannelOrder, "channel_order", channel_order),
        data=data,
    )
    source = from_net(
        net,
        described.complete(),
        described,
        digest_of_weights(net),
        architecture or type(net).__name__,
        **(arguments or {}),
    )
    order = Order(
        model_in(repository, name),
        [_value_of(ArtifactFormat, "formats", each) for each in formats],
        [_value_of(Precision, "precisions", each) for each in precisions],
        data=data,
        images=Path(images) if images else None,
        samples=samples,
    )
    return publish_source(source, order)


def _value_of(kinds: type[_Kind], field: str, value: str) -> _Kind:
    try:
        return kinds(value)
    except ValueError:
        known = ", ".join(each.value for each in kinds)
        raise InputError(f"{field}: expected one of {known}, got {value!r}") from None
