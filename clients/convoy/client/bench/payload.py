"""What a load generator sends: requests that are serialized once, before the run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.client.bench import BenchError
from convoy.client.images import classify_request
from convoy.client.results import ModelStatus
from convoy.client.tensors import Array, dtype_of, infer_request

CLASSIFY = "/convoy.v1.ClassifierService/Classify"
INFER = "/inference.GRPCInferenceService/ModelInfer"

_BYTES = "BYTES"
_DIFFERENT_TENSORS = 16
_SEED = 0


@dataclass(frozen=True, slots=True)
class Payload:
    """Requests that are sent in turn.

    Attributes:
        method: The path of the RPC.
        requests: Serialized messages.
        images: How many each holds.
    """

    method: str
    requests: tuple[bytes, ...] = field(repr=False)
    images: int = 1

    @property
    def request_bytes(self) -> float:
        """Their mean size."""
        return sum(map(len, self.requests)) / len(self.requests)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input of a model: its name, datatype and shape, -1 for an axis of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "TensorSpec":
        """Read NAME:DATATYPE:D,D,D, as in image:UINT8:-1,32,32,3.

        Raises:
            BenchError: It has another form.
        """
        try:
            name, datatype, shape = text.rsplit(":", 2)
            return cls(name, datatype.upper(), tuple(map(int, shape.split(","))))
        except ValueError:
            raise BenchError(f"--input: expected NAME:DATATYPE:D,D,D, got {text!r}") from None


class TensorMetadata(Protocol):
    """An input as a server describes it."""

    name: str
    datatype: str
    shape: Sequence[int]


def choose_input(inputs: Sequence[TensorMetadata], *, encoded: bool) -> TensorSpec:
    """Return the input that image files, or else pixels, go into.

    Raises:
        BenchError: The model has none, or several.
    """
    fitting = [tensor for tensor in inputs if (tensor.datatype == _BYTES) == encoded]
    if len(fitting) != 1:
        wanted = "one BYTES input for encoded images" if encoded else "one input that is not BYTES"
        names = ", ".join(f"{tensor.name} {tensor.datatype}" for tensor in inputs)
        raise BenchError(f"--payload: expected a model with {wanted}, got {names}; give --input")
    return TensorSpec(fitting[0].name, fitting[0].datatype, tuple(fitting[0].shape))


def encoded_payload(files: Sequence[Path], model: str, version: int) -> Payload:
    """Image files for convoy.v1, which the server decodes.

    Raises:
        BenchError: There is none.
        ImageError: One cannot be read.
    """
    if not files:
        raise BenchError("expected image files to send")
    requests = (classify_request(file, model, version, 1) for file in files)
    return Payload(CLASSIFY, tuple(request.SerializeToString() for request in requests))


def raw_payload(files: Sequence[Path], served: ModelStatus) -> Payload:
    """Pixels of the model's size for convoy.v1: the files', or random ones where there are none.

    Raises:
        BenchError: A file is not an image.
    """
    spec = TensorSpec("", "UINT8", (served.height_px, served.width_px, 3))
    images = [_pixels(file, spec) for file in files] or _random_pixels(spec)
    requests = (classify_request(image, served.name, served.version, 1) for image in images)
    return Payload(CLASSIFY, tuple(request.SerializeToString() for request in requests))


def tensor_payload(
    files: Sequence[Path], spec: TensorSpec, images: int, model: str, version: str
) -> Payload:
    """Tensors for any server of the Open Inference Protocol.

    Args:
        files: `.npy` arrays that are sent as they are; images, encoded for a BYTES input and as
            pixels `[H, W, 3]` for a UINT8 one; none for random values.
        spec: The input.
        images: What the input's first axis is filled with; other free axes become 1.
        model: Its name.
        version: Empty for the one in service.

    Raises:
        BenchError: A file does not fit.
    """
    row = TensorSpec(spec.name, spec.datatype, tuple(max(1, length) for length in spec.shape[1:]))
    rows = [_row(file, row) for file in files]
    if spec.datatype == _BYTES and not rows:
        raise BenchError("expected image files to send")
    if not rows:
        rows = _random(row)
    batches = [
        np.stack([rows[(first + n) % len(rows)] for n in range(images)])
        for first in range(len(rows))
    ]
    requests = (infer_request(model, {spec.name: batch}, version, ()) for batch in batches)
    return Payload(INFER, tuple(request.SerializeToString() for request in requests), images)


def _row(file: Path, spec: TensorSpec) -> Array:
    if spec.datatype == _BYTES:
        return np.array(_read(file), object).reshape(spec.shape)
    if file.suffix != ".npy":
        return _pixels(file, spec)
    try:
        row: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BenchError(f"{file}: {error}") from error
    wanted = dtype_of(spec.datatype)
    if row.shape != spec.shape or row.dtype != wanted:
        raise BenchError(
            f"{file}: expected {wanted} {list(spec.shape)} for {spec.name!r}, "
            f"got {row.dtype} {list(row.shape)}"
        )
    return row


def _pixels(file: Path, spec: TensorSpec) -> NDArray[np.uint8]:
    if spec.datatype != "UINT8" or len(spec.shape) != 3 or spec.shape[2] != 3:
        raise BenchError(
            f"{file}: an image is pixels UINT8 [H, W, 3]; {spec.name!r} takes {spec.datatype} "
            f"{list(spec.shape)}: send .npy files, or none for random values"
        )
    height, width, _ = spec.shape
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB").resize((width, height)))
    except OSError as error:
        raise BenchError(f"{file}: {error}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BenchError(f"{file}: {error.strerror}") from error


def _random(spec: TensorSpec) -> list[Array]:
    """Different tensors, so that no cache can answer."""
    dtype = dtype_of(spec.datatype)
    if dtype == np.uint8:
        return list(_random_pixels(spec))
    random = np.random.default_rng(_SEED)
    shape = (_DIFFERENT_TENSORS, *spec.shape)
    values = random.random(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
    return list(values.astype(dtype))


def _random_pixels(spec: TensorSpec) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(_SEED)
    return list(random.integers(0, 256, (_DIFFERENT_TENSORS, *spec.shape), np.uint8))
