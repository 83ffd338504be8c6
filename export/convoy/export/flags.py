"""The options of `convoy-export`, as types of its commands' parameters."""

from pathlib import Path
from typing import Annotated

import typer

from convoy.export.errors import InputError
from convoy.export.formats import ArtifactFormat, ChannelOrder, Layout, OutputKind, Precision

Repository = Annotated[
    str,
    typer.Option(
        help="The model repository: a folder, or a URL in an object store (s3://, gs://, az://; "
        "extra cloud). Versions appear in REPOSITORY/NAME/."
    ),
]
Name = Annotated[str, typer.Argument(help="Name under which the model is served.")]
ServedName = Annotated[str, typer.Option(help="Name under which the model is served.")]
VersionFolder = Annotated[
    str,
    typer.Argument(help="A published version: models/digits/3, or s3://bucket/models/digits/3."),
]
Data = Annotated[
    str | None,
    typer.Option(help="Labeled data; by default the data set of the training."),
]
Formats = Annotated[
    list[ArtifactFormat] | None,
    typer.Option(
        "--format",
        help="Artifact to write; repeatable. By default onnx and torchscript, if possible.",
    ),
]
Precisions = Annotated[
    list[Precision] | None,
    typer.Option(
        "--precision",
        help="Write additional artifacts: tf32, fp16 and bf16 (not ONNX) for CUDA, "
        "whose proof takes minutes on a CPU without such arithmetic; int8 for ONNX on a CPU. "
        "Repeatable.",
    ),
]
OpenVino = Annotated[
    bool | None,
    typer.Option(
        "--openvino/--no-openvino",
        help="Prove ONNX artifacts in OpenVINO too; by default where it is installed. Its failure "
        "ends the export of an artifact that --format or --precision names, and is recorded "
        "for others.",
    ),
]
Script = Annotated[
    bool,
    typer.Option(
        "--script",
        help="Compile TorchScript from the source code, with its control flow, instead of tracing.",
    ),
]
SigningKey = Annotated[
    Path | None,
    typer.Option(
        help="Ed25519 private key (PEM) to sign with; verify and the server can require it."
    ),
]
AbstainBelow = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Set the abstain flag of replies whose largest probability is below this. 0: never.",
    ),
]
Triple = tuple[float, float, float]
Labels = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Class names in the order of the net's outputs, one per line.",
    ),
]
Mean = Annotated[
    Triple | None, typer.Option(help="Mean of red, green and blue, for pixels from 0 to 1.")
]
Std = Annotated[
    Triple | None,
    typer.Option(help="Standard deviation, likewise; a pixel becomes (x - mean) / std."),
]
ProofData = Annotated[
    str | None,
    typer.Option(
        help="Labeled data for the proof, which then measures accuracy: digits, cifar10 or "
        "imagefolder:PATH. Classes are matched to the labels by name."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder of images for the proof instead. Subfolders named like labels add accuracy.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1, help="Largest number of images for the proof; by default 512, fewer for slow nets."
    ),
]
ImageSize = Annotated[
    str | None, typer.Option(metavar="PX|HxW", help="Height and width of the input.")
]
ResizeShorter = Annotated[
    int | None,
    typer.Option(min=0, help="Shorter side before the crop; 0 resizes without cropping."),
]
Interpolation = Annotated[
    str | None, typer.Option(help="Filter of the resize: bilinear (default) or bicubic.")
]
Antialias = Annotated[
    bool | None,
    typer.Option(
        "--antialias/--no-antialias",
        help="How the net's training shrank images: averaging (Pillow; the default), or "
        "interpolating at points (OpenCV, torchvision's antialias=False).",
    ),
]
Decoding = Annotated[
    str | None,
    typer.Option(
        "--decode",
        help="exact: decode all pixels of a file (the default). scaled: decode large JPEGs at 1/2, "
        "1/4 or 1/8 of their size; this is faster and changes the pixels slightly.",
    ),
]
Channels = Annotated[
    ChannelOrder | None,
    typer.Option(
        "--channel-order",
        help="Channels of the net's input: rgb (default), bgr, or gray for one channel.",
    ),
]
Output = Annotated[
    OutputKind | None,
    typer.Option(
        help="Kind of the net's output: logits (default; a softmax is added), probabilities (it "
        "ends in a softmax) or sigmoid (it ends in a sigmoid for each class)."
    ),
]
InputLayout = Annotated[
    Layout | None,
    typer.Option("--layout", help="Layout of an ONNX input; detected if it is unambiguous."),
]
OutputName = Annotated[
    str | None, typer.Option(help="ONNX output with the scores, if there are several.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the net; repeatable."),
]
StateDictKey = Annotated[
    str | None,
    typer.Option(help="Path of keys to the weights in their file, such as model.state_dict."),
]
StripPrefix = Annotated[str | None, typer.Option(help="Prefix of the weights' names to remove.")]
Ema = Annotated[
    bool, typer.Option("--ema", help="Use the averaged weights (EMA) of a file that has both.")
]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of PX or HxW.

    Raises:
        InputError: The text is neither.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"image_size_px: expected PX or HEIGHTxWIDTH, got {text!r}")
    return int(parts[0]), int(parts[-1])
