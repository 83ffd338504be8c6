"""The kind of a model's file, what is missing, and the command that would publish it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from convoy.export import foreign, huggingface
from convoy.export.description import InputDescription
from convoy.export.errors import InputError
from convoy.export.foreign import Kind
from convoy.export.onnx_graph import ForeignGraph, ReadOptions, read_graph
from convoy.training import checkpoints, nets
from convoy.training.errors import TrainingError
from convoy.training.nets import torchvision_nets
from convoy.training.weights import read_weights

_EXAMPLES = {
    "--labels": "--labels labels.txt",
    "--mean": "--mean 0.485 0.456 0.406",
    "--std": "--std 0.229 0.224 0.225",
    "--image-size-px": "--image-size-px 224",
}
"""Examples of flag values, with ImageNet's constants."""
_CLASSES = 1000


def inspect(path: Path) -> Iterator[str]:
    """Yield lines for the user: the kind of a path, what is missing, the command to publish it.

    Raises:
        InputError: It is not a model, or it cannot be published; the message gives the reason.
    """
    kind = foreign.kind_of(path)
    if kind is Kind.WEIGHTS:
        yield from _inspect_weights(path)
        return
    yield f"{path}: {kind.value}"
    known, more = InputDescription(), ""
    match kind:
        case Kind.ONNX:
            graph = read_graph(path, ReadOptions(image_size_px=_fallback_size(path)))
            yield from _graph_lines(graph)
            if _fallback_size(path) is None:
                known = InputDescription(image_size_px=(graph.height_px, graph.width_px))
            if graph.ends_in is not None:
                more = f"--output {graph.ends_in.value}"
        case Kind.HUGGING_FACE:
            known = huggingface.describe(path)
        case Kind.TRITON:
            known = foreign.describe_triton(path)
        case Kind.TORCH_SERVE:
            known = foreign.describe_torch_serve(path)
        case Kind.AOT_INDUCTOR:
            raise InputError(
                f"{path.name}: is {kind.value}; it cannot be wrapped: publish the .pt2 archive "
                "that it was compiled from"
            )
    yield from _command(f"import {shlex.quote(str(path))}", path.stem, known, more)


def _fallback_size(path: Path) -> tuple[int, int] | None:
    """Return a size for a graph whose height and width are free, else None."""
    try:
        read_graph(path, ReadOptions())
    except InputError as error:
        if "--image-size-px" in str(error):
            return (224, 224)
        raise
    return None


def _graph_lines(graph: ForeignGraph) -> Iterator[str]:
    kind = "float16" if graph.half else "float32"
    gray = "gray, " if graph.channels == 1 else ""
    batch = (
        f"a fixed batch of {graph.fixed_batch}, which the export makes dynamic"
        if graph.fixed_batch
        else "any batch"
    )
    yield (
        f"input {graph.input_name!r}: {kind}, {gray}{graph.layout.value.upper()}, "
        f"{graph.height_px} x {graph.width_px} px, {batch}; weights in {graph.precision.value}"
    )
    ends = f", ends in {graph.ends_in.value}" if graph.ends_in else ""
    yield f"output {graph.output_name!r}{ends}"


def _inspect_weights(path: Path) -> Iterator[str]:
    try:
        found = checkpoints.load(path) if path.suffix != ".safetensors" else None
    except TrainingError:
        found = None
    if found is not None:
        name = found.architecture.name
        yield f"{path}: a checkpoint of convoy-train: {name}, {len(found.data.classes)} classes"
        model = f" --model {name}" if found.architecture.source_sha256 else ""
        yield "publish it with"
        yield f"  convoy-export {shlex.quote(str(path))} --name {path.stem}{model}"
        return
    try:
        weights = read_weights(path)
    except TrainingError as error:
        raise InputError(str(error)) from error
    count = sum(tensor.numel() for tensor in weights.values())
    yield f"{path}: weights, {len(weights)} tensors, {count:,} numbers"
    names = matching_nets(weights)
    if names:
        yield f"they fit torchvision's {', '.join(names)}"
        command = f"weights {shlex.quote(str(path))} --architecture {names[0]}"
    else:
        yield "they fit no torchvision net; name the code that creates the net"
        command = f"module FILE.py:FACTORY --weights {shlex.quote(str(path))}"
    yield from _command(command, path.stem, InputDescription(), "")


def matching_nets(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the torchvision classifiers that weights fit, except for the head."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    found = []
    for name in torchvision_nets.names():
        try:
            with torch.device("meta"):
                net = nets.create(name, n_classes=_CLASSES)
        # RegNets compute their widths with tensors, which have no values on this device.
        except NotImplementedError:
            continue
        own = {key: tuple(value.shape) for key, value in net.state_dict().items()}
        head = nets.head_of(net) + "."
        body = {key for key in own if not key.startswith(head)}
        counters = {key for key in own if key.endswith("num_batches_tracked")}
        fits = all(shapes.get(key) == own[key] for key in body - counters)
        if fits and shapes.keys() <= own.keys():
            found.append(name)
    return found


def _command(command: str, name: str, known: InputDescription, more: str) -> Iterator[str]:
    missing = known.missing()
    stated = [
        f"{label} {value}"
        for label, value in (
            ("classes:", len(known.labels) if known.labels else None),
            ("mean", known.mean),
            ("std", known.std),
        )
        if value
    ]
    if stated:
        yield f"the files state: {', '.join(stated)}"
    if missing:
        yield f"missing: {', '.join(missing)}"
    examples = [_EXAMPLES[flag] for flag in missing]
    yield "publish it with"
    yield " ".join(filter(None, [f"  convoy-export {command} --name {name}", *examples, more]))
