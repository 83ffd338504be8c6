"""The kinds of artifact; a separate module so that the command line starts without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from convoy.export.errors import InputError
from convoy.v1 import model_manifest_pb2 as pb


class ArtifactFormat(Enum):
    """Format of an artifact; the values are the names on the command line."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported-program"
    AOT_INDUCTOR = "aot-inductor"


class Precision(Enum):
    """Number format of the weights and of the arithmetic between input and logits."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    TF32 = "tf32"
    """The float32 file, whose products CUDA may compute in TF32."""


class OutputKind(Enum):
    """Kind of a net's output; the values are the names on the command line."""

    LOGITS = "logits"
    """Unnormalized scores: the servable adds the softmax."""
    PROBABILITIES = "probabilities"
    """The net ends in a softmax: nothing is added, the logits are log-probabilities."""
    SIGMOID = "sigmoid"
    """The net ends in a sigmoid per class: nothing is added, and the sum need not be 1."""


class ChannelOrder(Enum):
    """The color channels that a net takes."""

    RGB = "rgb"
    BGR = "bgr"
    GRAY = "gray"
    """One channel: 0.299 R + 0.587 G + 0.114 B."""

    @property
    def channels(self) -> int:
        """How many channels the net's input has."""
        return 1 if self is ChannelOrder.GRAY else 3


LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in gray (ITU-R BT.601), as Pillow has them."""


class Layout(Enum):
    """Order of the axes of an ONNX graph's input."""

    NCHW = "nchw"
    NHWC = "nhwc"


_TORCH_FORMATS = frozenset({ArtifactFormat.TORCHSCRIPT, ArtifactFormat.EXPORTED_PROGRAM})

SUPPORTED_FORMATS = {
    Precision.FP32: frozenset(ArtifactFormat),
    Precision.FP16: _TORCH_FORMATS | {ArtifactFormat.ONNX},
    # ONNX Runtime has no bfloat16 convolution on a CPU, so the proof could not run here.
    Precision.BF16: _TORCH_FORMATS,
    Precision.INT8: frozenset({ArtifactFormat.ONNX}),
    Precision.TF32: _TORCH_FORMATS | {ArtifactFormat.ONNX},
}
"""Which formats each precision is written in."""

WIRE_FORMATS = {
    ArtifactFormat.ONNX: pb.ARTEFACT_FORMAT_ONNX,
    ArtifactFormat.TORCHSCRIPT: pb.ARTEFACT_FORMAT_TORCHSCRIPT,
    ArtifactFormat.EXPORTED_PROGRAM: pb.ARTEFACT_FORMAT_EXPORTED_PROGRAM,
    ArtifactFormat.AOT_INDUCTOR: pb.ARTEFACT_FORMAT_AOT_INDUCTOR,
}
"""The manifest's name of each format."""

WIRE_PRECISIONS = {
    Precision.FP32: pb.PRECISION_FP32,
    Precision.FP16: pb.PRECISION_FP16,
    Precision.BF16: pb.PRECISION_BF16,
    Precision.INT8: pb.PRECISION_INT8,
    Precision.TF32: pb.PRECISION_TF32,
}
"""The manifest's name of each precision."""

_SUFFIXES = {
    ArtifactFormat.ONNX: "onnx",
    ArtifactFormat.TORCHSCRIPT: "torchscript",
    ArtifactFormat.EXPORTED_PROGRAM: "pt2",
    ArtifactFormat.AOT_INDUCTOR: "aoti.pt2",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One artifact of a version."""

    format: ArtifactFormat
    precision: Precision = Precision.FP32

    @property
    def file_name(self) -> str:
        """Name of the file next to the manifest."""
        shares = self.precision in {Precision.FP32, Precision.TF32}
        precision = "" if shares else f".{self.precision.value}"
        return f"model{precision}.{_SUFFIXES[self.format]}"

    @property
    def title(self) -> str:
        """Name for readers: the file's, and the precision where two share a file."""
        return f"{self.file_name} in TF32" if self.precision is Precision.TF32 else self.file_name


def choose_variants(
    formats: Sequence[ArtifactFormat],
    precisions: Sequence[Precision],
    own: Precision = Precision.FP32,
) -> list[Variant]:
    """Return each format in the net's own precision, then in the further precisions it supports.

    Args:
        formats: The formats to write.
        precisions: Further precisions.
        own: The precision of the net's weights.

    Raises:
        InputError: None of the formats supports a requested precision, or the net's own
            precision is too low to convert from.
    """
    wanted = dict.fromkeys(formats)
    # FP32 is the default of the command line, not a request to widen a net of another precision.
    further = [each for each in precisions if each not in (Precision.FP32, own)]
    if further and own is not Precision.FP32:
        raise InputError(
            f"precision {further[0].value}: expected a model in fp32 to convert, this one is in "
            f"{own.value}"
        )
    variants: list[Variant] = []
    for precision in dict.fromkeys((own, *further)):
        found = [
            Variant(form, precision) for form in wanted if form in SUPPORTED_FORMATS[precision]
        ]
        if not found:
            names = ", ".join(form.value for form in wanted)
            able = ", ".join(sorted(form.value for form in SUPPORTED_FORMATS[precision]))
            raise InputError(
                f"precision {precision.value}: expected a format of {able}, got {names}"
            )
        variants += found
    return variants


def variant_of(artifact: pb.Artefact) -> Variant:
    """Return the variant of an artifact in a manifest.

    Raises:
        StopIteration: This release does not know the format or precision.
    """
    precision = artifact.precision or pb.PRECISION_FP32
    return Variant(
        next(form for form, wire in WIRE_FORMATS.items() if wire == artifact.format),
        next(kept for kept, wire in WIRE_PRECISIONS.items() if wire == precision),
    )
