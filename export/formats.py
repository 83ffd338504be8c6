"""The kinds of artefact; kept apart so that the command line starts without loading torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from convoy.v1 import model_manifest_pb2 as pb


class ArtefactFormat(Enum):
    """What kind of file runs the model; the values are the names on the command line."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported-program"
    AOT_INDUCTOR = "aot-inductor"


class Precision(Enum):
    """What the weights and the arithmetic between input and logits are kept in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


_TORCH_FORMATS = frozenset({ArtefactFormat.TORCHSCRIPT, ArtefactFormat.EXPORTED_PROGRAM})

SUPPORTED_FORMATS = {
    Precision.FP32: frozenset(ArtefactFormat),
    Precision.FP16: _TORCH_FORMATS | {ArtefactFormat.ONNX},
    # ONNX Runtime has no bfloat16 convolution on a CPU, so it could not be proved here.
    Precision.BF16: _TORCH_FORMATS,
    Precision.INT8: frozenset({ArtefactFormat.ONNX}),
}
"""Which formats each precision is written in."""

WIRE_FORMATS = {
    ArtefactFormat.ONNX: pb.ARTEFACT_FORMAT_ONNX,
    ArtefactFormat.TORCHSCRIPT: pb.ARTEFACT_FORMAT_TORCHSCRIPT,
    ArtefactFormat.EXPORTED_PROGRAM: pb.ARTEFACT_FORMAT_EXPORTED_PROGRAM,
    ArtefactFormat.AOT_INDUCTOR: pb.ARTEFACT_FORMAT_AOT_INDUCTOR,
}
"""The manifest's name of each format."""

WIRE_PRECISIONS = {
    Precision.FP32: pb.PRECISION_FP32,
    Precision.FP16: pb.PRECISION_FP16,
    Precision.BF16: pb.PRECISION_BF16,
    Precision.INT8: pb.PRECISION_INT8,
}
"""The manifest's name of each precision."""

_SUFFIXES = {
    ArtefactFormat.ONNX: "onnx",
    ArtefactFormat.TORCHSCRIPT: "torchscript",
    ArtefactFormat.EXPORTED_PROGRAM: "pt2",
    ArtefactFormat.AOT_INDUCTOR: "aoti.pt2",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One artefact of a version."""

    format: ArtefactFormat
    precision: Precision = Precision.FP32

    @property
    def file_name(self) -> str:
        """Name of the file beside the manifest."""
        precision = "" if self.precision is Precision.FP32 else f".{self.precision.value}"
        return f"model{precision}.{_SUFFIXES[self.format]}"


def choose_variants(
    formats: Sequence[ArtefactFormat], precisions: Sequence[Precision]
) -> list[Variant]:
    """Returns every format in float32 and, after these, in each further precision that it has."""
    ordered = dict.fromkeys((Precision.FP32, *precisions))
    return [
        Variant(form, precision)
        for precision in ordered
        for form in dict.fromkeys(formats)
        if form in SUPPORTED_FORMATS[precision]
    ]


def variant_of(artefact: pb.Artefact) -> Variant:
    """Returns what a manifest says an artefact is.

    Raises:
        StopIteration: The format or precision is none that this release knows.
    """
    precision = artefact.precision or pb.PRECISION_FP32
    return Variant(
        next(form for form, wire in WIRE_FORMATS.items() if wire == artefact.format),
        next(kept for kept, wire in WIRE_PRECISIONS.items() if wire == precision),
    )
