"""The input and classes of a net from another tool, from flags and from its own files."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from convoy.export.errors import InputError, one_line
from convoy.export.formats import ChannelOrder, Layout, OutputKind
from convoy.training.checkpoints import DataDescription
from convoy.training.data import Preprocessing
from convoy.training.data.images import Decode, Interpolation

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class InputDescription:
    """The known properties of the input; unknown values are None.

    Attributes:
        labels: Class names in the order of the net's outputs.
        mean, std: Of red, green and blue, for pixels from 0 to 1.
        image_size_px: Height and width.
        resize_shorter_px: Shorter side before the center crop; 0 resizes without cropping.
        interpolation: Filter of the resize.
        antialias, decode: See `convoy.training.data.images.Preprocessing`.
        channel_order: The channels of the net's input.
        output: The kind of the net's output.
        layout, output_name: Of an ONNX graph, see `onnx_graph.ReadOptions`.
        data: Name of the data set of the training or the proof.
    """

    labels: tuple[str, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    image_size_px: tuple[int, int] | None = None
    resize_shorter_px: int | None = None
    interpolation: Interpolation | None = None
    antialias: bool | None = None
    decode: Decode | None = None
    channel_order: ChannelOrder | None = None
    output: OutputKind | None = None
    layout: Layout | None = None
    output_name: str | None = None
    data: str | None = None

    def or_else(self, other: "InputDescription") -> "InputDescription":
        """Return this description, with unknown values taken from another one."""
        return InputDescription(
            *(
                mine
                if (mine := getattr(self, each.name)) is not None
                else getattr(other, each.name)
                for each in fields(self)
            )
        )

    def complete(self) -> DataDescription:
        """Return the complete description that a source needs.

        Raises:
            InputError: Something is missing; the message names the flags.
        """
        if not (self.labels and self.mean and self.std and self.image_size_px):
            missing = ", ".join(self.missing())
            raise InputError(f"expected also {missing}, which the net's files do not contain")
        return DataDescription(
            spec=self.data or "",
            classes=self.labels,
            mean=self.mean,
            std=self.std,
            preprocessing=Preprocessing(
                *self.image_size_px,
                self.resize_shorter_px or 0,
                self.interpolation or "bilinear",
                self.antialias is not False,
                self.decode or "exact",
            ),
        )

    def missing(self) -> list[str]:
        """Return the flags that are still needed."""
        flags = {
            "--labels": self.labels,
            "--mean": self.mean,
            "--std": self.std,
            "--image-size-px": self.image_size_px,
        }
        return [flag for flag, value in flags.items() if not value]


def read_labels(path: Path) -> tuple[str, ...]:
    """Read class names, one per line; empty lines are ignored.

    Raises:
        InputError: The file is missing or not UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"labels {path}: expected UTF-8 text: {one_line(error)}") from error
    return tuple(line.strip() for line in lines if line.strip())


def triple(name: str, values: Sequence[float]) -> Triple:
    """Return three numbers.

    Raises:
        InputError: There are not three.
    """
    if len(values) != 3:
        raise InputError(f"{name}: expected 3 numbers, got {len(values)}")
    return float(values[0]), float(values[1]), float(values[2])
