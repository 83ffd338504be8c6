"""Reads what a version says about itself, and which one a model's owner wants served.

Both are messages of proto/convoy/v1/model_manifest.proto, written as JSON.
"""

import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from google.protobuf import json_format

from convoy.v1 import model_manifest_pb2 as pb
from server.errors import ManifestError
from server.files import open_plain
from server.policy import Promotion

MANIFEST_NAME = "manifest.json"
POLICY_NAME = "policy.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class Interpolation(Enum):
    """The filter an image is resized with."""

    BILINEAR = pb.INTERPOLATION_BILINEAR
    BICUBIC = pb.INTERPOLATION_BICUBIC


class ArtefactFormat(Enum):
    """What kind of file runs the model; the values are the names that settings use."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported-program"
    AOT_INDUCTOR = "aot-inductor"


_FORMATS = {
    pb.ARTEFACT_FORMAT_ONNX: ArtefactFormat.ONNX,
    pb.ARTEFACT_FORMAT_TORCHSCRIPT: ArtefactFormat.TORCHSCRIPT,
    pb.ARTEFACT_FORMAT_EXPORTED_PROGRAM: ArtefactFormat.EXPORTED_PROGRAM,
    pb.ARTEFACT_FORMAT_AOT_INDUCTOR: ArtefactFormat.AOT_INDUCTOR,
}
_PRECISIONS = {
    pb.PRECISION_UNSPECIFIED: "fp32",
    pb.PRECISION_FP32: "fp32",
    pb.PRECISION_FP16: "fp16",
    pb.PRECISION_BF16: "bf16",
    pb.PRECISION_INT8: "int8",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor; -1 in the shape is the batch axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an encoded image becomes the model's input; the steps are stated in the .proto."""

    height_px: int
    width_px: int
    resize_shorter_px: int
    interpolation: Interpolation


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file beside the manifest, with what it must contain."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artefact:
    """One runnable file.

    Attributes:
        tolerance: What any logit may differ from the golden samples' by.
        precision: Of its weights and arithmetic: "fp32", "fp16", "bf16" or "int8".
    """

    format: ArtefactFormat
    file: FileRecord
    tolerance: float
    precision: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published model version.

    Attributes:
        artefacts: Those in a format that this server knows.
        files: Every file beside the manifest, of any format.
        temperature: Probabilities are softmax(logits / temperature).
        abstain_threshold: A largest probability below it is no answer; 0 for always one.
    """

    name: str
    version: int
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    artefacts: tuple[Artefact, ...]
    samples: FileRecord
    files: tuple[FileRecord, ...]
    temperature: float = 1.0
    abstain_threshold: float = 0.0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)` of one image."""
        height, width, channels = self.input.shape[1:]
        return height, width, channels

    def artefact(self, wanted: ArtefactFormat, precision: str = "fp32") -> Artefact:
        """Returns the artefact of a format and precision.

        Raises:
            ManifestError: The version has none.
        """
        for artefact in self.artefacts:
            if (artefact.format, artefact.precision) == (wanted, precision):
                return artefact
        offered = ", ".join(f"{each.format.value} {each.precision}" for each in self.artefacts)
        raise ManifestError(
            f"model {self.name!r} version {self.version}: expected an artefact of format "
            f"{wanted.value!r} in {precision}, found {offered or 'none'}"
        )


def read_manifest(version_dir: Path) -> Manifest:
    """Reads and checks the manifest of the version in a folder NAME/VERSION.

    Raises:
        ManifestError: It is missing, malformed, of another schema, or describes another version.
    """
    return parse_manifest(version_dir, read_manifest_bytes(version_dir))


def read_manifest_bytes(version_dir: Path) -> bytes:
    """Returns what a signature is made over.

    Raises:
        ManifestError: The manifest is missing, or larger than any is.
    """
    try:
        return _read_small(version_dir / MANIFEST_NAME)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{_where(version_dir)}: {_one_line(error)}") from error


def parse_manifest(version_dir: Path, content: bytes) -> Manifest:
    """Checks the bytes of a manifest that was read from a folder NAME/VERSION.

    Raises:
        ManifestError: It is malformed, of another schema, or describes another version.
    """
    where = _where(version_dir)
    try:
        manifest = _convert(json_format.ParseDict(_parse_json(content), pb.ModelManifest()))
    except (ValueError, json_format.ParseError) as error:
        raise ManifestError(f"{where}: {_one_line(error)}") from error
    found = (manifest.name, str(manifest.version))
    if found != (version_dir.parent.name, version_dir.name):
        raise ManifestError(
            f"{where}: it describes model {manifest.name!r} version {manifest.version}"
        )
    return manifest


def read_policy(model_dir: Path) -> Promotion | None:
    """Returns what the policy of the model in folder NAME asks for, None without one.

    Raises:
        ManifestError: The policy is malformed or of another schema.
    """
    path = model_dir / POLICY_NAME
    try:
        policy = json_format.ParseDict(_parse_json(_read_small(path)), pb.ServingPolicy())
        _check_schema(policy.schema_version)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, json_format.ParseError) as error:
        where = f"model {model_dir.name!r}: {POLICY_NAME}"
        raise ManifestError(f"{where}: {_one_line(error)}") from error
    return Promotion(policy.version, tuple(policy.previous))


def _check_schema(found: int) -> None:
    if found != SCHEMA_VERSION:
        raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {found}")


def _where(version_dir: Path) -> str:
    return f"model {version_dir.parent.name!r} version {version_dir.name}: {MANIFEST_NAME}"


def _read_small(path: Path) -> bytes:
    with open_plain(path) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"expected at most {MAX_MANIFEST_BYTES} bytes")
    return content


def _parse_json(content: bytes) -> dict[str, object]:
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    return values


def _convert(message: pb.ModelManifest) -> Manifest:
    _check_schema(message.schema_version)
    manifest = Manifest(
        name=message.name,
        version=message.version,
        input=_tensor(message.input),
        outputs=tuple(map(_tensor, message.outputs)),
        labels=tuple(message.labels),
        preprocessing=_preprocessing(message.preprocessing),
        artefacts=tuple(
            Artefact(
                _FORMATS[a.format], _file(a.file), a.parity.tolerance, _PRECISIONS[a.precision]
            )
            for a in message.artefacts
            if a.format in _FORMATS
        ),
        samples=_file(message.samples.file),
        files=tuple(
            _file(file) for file in (*(a.file for a in message.artefacts), message.samples.file)
        ),
        temperature=message.temperature,
        abstain_threshold=message.abstain_threshold,
    )
    if not 0 <= manifest.abstain_threshold <= 1:
        raise ValueError(f"abstain_threshold: expected 0 to 1, got {manifest.abstain_threshold}")
    _check_tensors(manifest)
    return manifest


def _check_tensors(manifest: Manifest) -> None:
    shape = manifest.input.shape
    size_px = (manifest.preprocessing.height_px, manifest.preprocessing.width_px)
    if manifest.input.datatype != "UINT8" or shape != (-1, *size_px, 3):
        raise ValueError(
            f"input: expected UINT8 [-1, {size_px[0]}, {size_px[1]}, 3] as the preprocessing says, "
            f"got {manifest.input.datatype} {list(shape)}"
        )
    for expected, output in zip(("logits", "probabilities"), manifest.outputs, strict=True):
        if (output.name, output.datatype) != (expected, "FP32"):
            raise ValueError(
                f"outputs: expected {expected!r} FP32, got {output.name!r} {output.datatype}"
            )
        if output.shape != (-1, len(manifest.labels)):
            raise ValueError(
                f"outputs: {expected!r}: expected [-1, {len(manifest.labels)}] for as many labels, "
                f"got {list(output.shape)}"
            )


def _tensor(message: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, message.datatype, tuple(message.shape))


def _preprocessing(message: pb.ImagePreprocessing) -> Preprocessing:
    if not message.height_px or not message.width_px:
        raise ValueError("preprocessing: expected height_px and width_px above 0")
    shorter_px = message.resize_shorter_px
    if shorter_px and shorter_px < max(message.height_px, message.width_px):
        raise ValueError(
            f"preprocessing: resize_shorter_px: expected 0 or at least the crop's larger side, "
            f"got {shorter_px}"
        )
    return Preprocessing(
        message.height_px, message.width_px, shorter_px, Interpolation(message.interpolation)
    )


def _file(message: pb.File) -> FileRecord:
    if not _PLAIN_FILE_NAME.fullmatch(message.name):
        raise ValueError(f"file name: expected a plain name without folders, got {message.name!r}")
    return FileRecord(message.name, message.size_bytes, message.sha256)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "cannot be read"
    return " ".join(str(error).split())
