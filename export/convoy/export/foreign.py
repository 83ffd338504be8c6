"""Models of other tools: identify a path, and make a source of it.

ONNX, TorchScript, torch.export's .pt2, a Hugging Face folder, a Triton model folder, and a
TorchServe archive with the image_classifier handler.
"""

import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from google.protobuf import text_format
from torch import Tensor, nn

from convoy.export import huggingface
from convoy.export.description import InputDescription, read_labels
from convoy.export.errors import InputError, one_line
from convoy.export.formats import ArtifactFormat, ChannelOrder, Layout
from convoy.export.onnx_graph import ReadOptions, read_graph
from convoy.export.onnx_import import from_onnx
from convoy.export.source import ModelSource, digest_of_file, from_net
from convoy.oip.v2 import model_config_pb2

TRITON_CONFIG = "config.pbtxt"
_MAR_MANIFEST = "MAR-INF/MANIFEST.json"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_MAX_MEMBER_BYTES = 4 * 1024**3


class Kind(Enum):
    """The kind of a path."""

    ONNX = "an ONNX file"
    TORCHSCRIPT = "a TorchScript file"
    EXPORTED_PROGRAM = "a torch.export archive (.pt2)"
    AOT_INDUCTOR = "an AOTInductor package, native code for one kind of processor"
    HUGGING_FACE = "a Hugging Face model folder"
    TRITON = "a Triton model folder"
    TORCH_SERVE = "a TorchServe archive (.mar)"
    WEIGHTS = "PyTorch or safetensors weights"


class ProgramNet(nn.Module):
    """Holds a program of torch.export, which does not allow a switch to training or eval mode."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> "ProgramNet":
        """Leave the program as it was exported."""
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the program."""
        scores: Tensor = self.program(pixels)
        return scores


def kind_of(path: Path) -> Kind:
    """Return the kind of a path, by its content.

    Raises:
        InputError: The kind is unknown.
    """
    if path.is_dir():
        if (path / TRITON_CONFIG).is_file():
            return Kind.TRITON
        if (path / huggingface.CONFIG).is_file():
            return Kind.HUGGING_FACE
        raise InputError(f"{path}: expected a folder with {TRITON_CONFIG} or {huggingface.CONFIG}")
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if zipfile.is_zipfile(path):
        return _kind_of_archive(path)
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar"):
        return Kind.WEIGHTS
    return Kind.ONNX


def read_foreign(path: Path, flags: InputDescription) -> ModelSource:
    """Make a source of a model that another tool wrote.

    Args:
        path: A file or folder.
        flags: The user's options; they take precedence over the files.

    Raises:
        InputError: It is not an image classifier, cannot be read, or information about its input
            is missing; the message names it.
    """
    return _READERS[kind_of(path)](path, flags)


def _read_onnx(path: Path, flags: InputDescription) -> ModelSource:
    options = ReadOptions(flags.image_size_px, flags.layout, flags.output_name)
    try:
        graph = read_graph(path, options)
    except InputError as error:
        message = str(error)
        raise InputError(message if path.name in message else f"{path.name}: {message}") from error
    described = flags.or_else(InputDescription(image_size_px=(graph.height_px, graph.width_px)))
    order = described.channel_order or (
        ChannelOrder.GRAY if graph.channels == 1 else ChannelOrder.RGB
    )
    if order.channels != graph.channels:
        raise InputError(
            f"{path.name}: channel_order: the input has {graph.channels} channels, got "
            f"{order.value}"
        )
    return from_onnx(path, graph, described.complete(), described.output, order)


def _read_torchscript(path: Path, flags: InputDescription) -> ModelSource:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")
        try:
            net = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path.name}: expected TorchScript: {one_line(error)}") from error
    return _only(path, net, flags, "torchscript", (ArtifactFormat.TORCHSCRIPT,))


def _read_program(path: Path, flags: InputDescription) -> ModelSource:
    try:
        with warnings.catch_warnings():
            # torch 2.11 warns about how it reads its own file.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            program = torch.export.load(path)
            net = ProgramNet(program.module())
    # The reader may raise any exception for a malformed archive.
    except Exception as error:
        raise InputError(f"{path.name}: torch.export cannot read it: {one_line(error)}") from error
    formats = (ArtifactFormat.EXPORTED_PROGRAM, ArtifactFormat.ONNX, ArtifactFormat.AOT_INDUCTOR)
    return _only(path, net, flags, "exported-program", formats)


def _only(
    path: Path,
    net: nn.Module,
    flags: InputDescription,
    architecture: str,
    formats: tuple[ArtifactFormat, ...],
) -> ModelSource:
    source = from_net(net, flags.complete(), flags, digest_of_file(path), architecture)
    return replace(source, formats=formats)


def _read_triton(folder: Path, flags: InputDescription) -> ModelSource:
    config = _triton_config(folder)
    described = flags.or_else(describe_triton(folder))
    versions = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    if not versions:
        raise InputError(f"{folder}: expected a version folder such as 1, found none")
    version = folder / str(versions[-1])
    names = [config.default_model_filename] if config.default_model_filename else []
    names += ["model.onnx", "model.pt"]
    for name in names:
        if (version / name).is_file():
            return read_foreign(version / name, described)
    raise InputError(
        f"{version}: expected model.onnx or model.pt, found "
        f"{', '.join(sorted(entry.name for entry in version.iterdir())) or 'nothing'}"
    )


def _triton_config(folder: Path) -> model_config_pb2.ModelConfig:
    path = folder / TRITON_CONFIG
    try:
        return text_format.Parse(
            path.read_text(encoding="utf-8"),
            model_config_pb2.ModelConfig(),
            allow_unknown_field=True,
        )
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise InputError(f"{path}: {one_line(error)}") from error


def describe_triton(folder: Path) -> InputDescription:
    """Return the input and classes that a Triton model folder describes.

    Raises:
        InputError: Its files are missing or malformed.
    """
    config = _triton_config(folder)
    labels = None
    names = [output.label_filename for output in config.output if output.label_filename]
    if names:
        if Path(names[0]).name != names[0]:
            raise InputError(f"{folder}: label_filename: expected a plain name, got {names[0]!r}")
        labels = read_labels(folder / names[0])
    layout, size = None, None
    if config.input:
        image = config.input[0]
        if image.format == model_config_pb2.ModelInput.FORMAT_NHWC:
            layout = Layout.NHWC
        elif image.format == model_config_pb2.ModelInput.FORMAT_NCHW:
            layout = Layout.NCHW
        dims = list(image.dims)[-3:]
        sides = dims[:2] if layout is Layout.NHWC or dims[-1:] == [3] else dims[1:]
        if len(sides) == 2 and min(sides) > 0:
            size = (int(sides[0]), int(sides[1]))
    return InputDescription(labels=labels, image_size_px=size, layout=layout)


def _read_torch_serve(path: Path, flags: InputDescription) -> ModelSource:
    with _unpacked(path) as folder:
        manifest = _read_mar_manifest(path, folder)
        model = manifest["model"]
        handler = str(model.get("handler", ""))
        if Path(handler).stem != "image_classifier":
            raise InputError(
                f"{path.name}: handler: expected image_classifier, got {handler!r}: its "
                "preprocessing is code"
            )
        if model.get("modelFile"):
            raise InputError(
                f"{path.name}: its net is code, {model['modelFile']}; unpack it and run "
                f"`convoy-export module {model['modelFile']}:CLASS --weights "
                f"{model.get('serializedFile')}`"
            )
        described = flags.or_else(_image_classifier_input(path, folder))
        return read_foreign(folder / Path(str(model.get("serializedFile", ""))).name, described)


def describe_torch_serve(path: Path) -> InputDescription:
    """Return the input and classes that a TorchServe archive describes.

    Raises:
        InputError: Its files are malformed.
    """
    with _unpacked(path) as folder:
        return _image_classifier_input(path, folder)


def _image_classifier_input(path: Path, folder: Path) -> InputDescription:
    """Return the preprocessing of the handler image_classifier."""
    return InputDescription(
        labels=_mar_labels(path, folder),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        image_size_px=(224, 224),
        resize_shorter_px=256,
        interpolation="bilinear",
    )


def _mar_labels(path: Path, folder: Path) -> tuple[str, ...] | None:
    file = folder / "index_to_name.json"
    if not file.is_file():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
        ordered = [names[str(index)] for index in range(len(names))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path.name}: index_to_name.json: expected names by index from 0: {one_line(error)}"
        ) from error
    return tuple(str(name[-1] if isinstance(name, list) else name) for name in ordered)


def _read_mar_manifest(path: Path, folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MAR_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name}: {_MAR_MANIFEST}: {one_line(error)}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("model"), dict):
        raise InputError(f"{path.name}: {_MAR_MANIFEST}: expected an object with a model")
    return manifest


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Unpack an archive's own files into a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(path) as archive:
        folder = Path(name)
        if sum(member.file_size for member in archive.infolist()) > _MAX_MEMBER_BYTES:
            raise InputError(f"{path.name}: expected at most {_MAX_MEMBER_BYTES} bytes unpacked")
        # extractall keeps members inside the folder.
        archive.extractall(folder)
        yield folder


def _kind_of_archive(path: Path) -> Kind:
    with zipfile.ZipFile(path) as archive:
        whole = set(archive.namelist())
    inner = {name.partition("/")[2] for name in whole}
    if _MAR_MANIFEST in whole:
        return Kind.TORCH_SERVE
    if any("aotinductor/" in name for name in whole):
        return Kind.AOT_INDUCTOR
    if "archive_format" in inner | whole or any(name.startswith("models/") for name in inner):
        return Kind.EXPORTED_PROGRAM
    if "constants.pkl" in inner:
        return Kind.TORCHSCRIPT
    if "data.pkl" in inner:
        return Kind.WEIGHTS
    raise InputError(f"{path.name}: expected a PyTorch or TorchServe archive, found another kind")


def _reject_weights(path: Path, flags: InputDescription) -> ModelSource:
    raise InputError(
        f"{path.name}: is weights without a net; use `convoy-export weights {path.name} "
        "--architecture NAME` or `convoy-export module FILE.py:FACTORY --weights …`"
    )


def _reject_package(path: Path, flags: InputDescription) -> ModelSource:
    raise InputError(
        f"{path.name}: is an AOTInductor package, native code that cannot be wrapped; "
        "import the .pt2 archive that it was compiled from"
    )


_READERS: dict[Kind, Callable[[Path, InputDescription], ModelSource]] = {
    Kind.ONNX: _read_onnx,
    Kind.TORCHSCRIPT: _read_torchscript,
    Kind.EXPORTED_PROGRAM: _read_program,
    Kind.AOT_INDUCTOR: _reject_package,
    Kind.HUGGING_FACE: huggingface.from_folder,
    Kind.TRITON: _read_triton,
    Kind.TORCH_SERVE: _read_torch_serve,
    Kind.WEIGHTS: _reject_weights,
}
