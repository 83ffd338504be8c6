"""Parse manifest.json, which describes a version, and policy.json, which promotes one.

Both are messages of proto/convoy/v1/model_manifest.proto, written as JSON. `repository` reads the
files.
"""

import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from google.protobuf import json_format

from convoy.server.errors import ManifestError
from convoy.server.models.policy import Promotion
from convoy.v1 import model_manifest_pb2 as pb

MANIFEST_NAME = "manifest.json"
POLICY_NAME = "policy.json"
SCHEMA_VERSION = 1
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class Interpolation(Enum):
    """The resize filter of an image."""

    BILINEAR = pb.INTERPOLATION_BILINEAR
    BICUBIC = pb.INTERPOLATION_BICUBIC


class ArtifactFormat(Enum):
    """The file format of an artifact; the values are the names that settings use."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    EXPORTED_PROGRAM = "exported-program"
    AOT_INDUCTOR = "aot-inductor"


_FORMATS = {
    pb.ARTEFACT_FORMAT_ONNX: ArtifactFormat.ONNX,
    pb.ARTEFACT_FORMAT_TORCHSCRIPT: ArtifactFormat.TORCHSCRIPT,
    pb.ARTEFACT_FORMAT_EXPORTED_PROGRAM: ArtifactFormat.EXPORTED_PROGRAM,
    pb.ARTEFACT_FORMAT_AOT_INDUCTOR: ArtifactFormat.AOT_INDUCTOR,
}
_PRECISIONS = {
    pb.PRECISION_UNSPECIFIED: "fp32",
    pb.PRECISION_FP32: "fp32",
    pb.PRECISION_FP16: "fp16",
    pb.PRECISION_BF16: "bf16",
    pb.PRECISION_INT8: "int8",
    pb.PRECISION_TF32: "tf32",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor; -1 in the shape is the batch axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an encoded image becomes the model's input; the .proto states the steps."""

    height_px: int
    width_px: int
    resize_shorter_px: int
    interpolation: Interpolation
    antialias: bool = True
    scaled_decoding: bool = False


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file next to the manifest, with its size and digest."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """One runnable file.

    Attributes:
        tolerance: The largest accepted difference of a logit from the golden samples.
        precision: Of its weights and arithmetic: "fp32", "tf32", "fp16", "bf16" or "int8".
    """

    format: ArtifactFormat
    file: FileRecord
    tolerance: float
    precision: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published model version.

    Attributes:
        artifacts: The artifacts in a format that this server knows.
        files: Every file except the manifest, of any format.
        temperature: Probabilities are softmax(logits / temperature).
        abstain_threshold: An answer whose largest probability is below it abstains; 0: never.
    """

    name: str
    version: int
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    artifacts: tuple[Artifact, ...]
    samples: FileRecord
    files: tuple[FileRecord, ...]
    temperature: float = 1.0
    abstain_threshold: float = 0.0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """`(H, W, 3)` of one image."""
        height, width, channels = self.input.shape[1:]
        return height, width, channels

    def artifact(self, wanted: ArtifactFormat, precision: str = "fp32") -> Artifact:
        """Return the artifact of a format and precision.

        Raises:
            ManifestError: The version has none.
        """
        for artifact in self.artifacts:
            if (artifact.format, artifact.precision) == (wanted, precision):
                return artifact
        offered = ", ".join(f"{each.format.value} {each.precision}" for each in self.artifacts)
        raise ManifestError(
            f"model {self.name!r} version {self.version}: expected an artifact of format "
            f"{wanted.value!r} in {precision}, found {offered or 'none'}"
        )


def parse_manifest(version_folder: Path, content: bytes) -> Manifest:
    """Parse the bytes of the manifest in a folder NAME/VERSION.

    Raises:
        ManifestError: It is malformed, has another schema, or describes another version.
    """
    where = manifest_of(version_folder)
    try:
        manifest = _convert(json_format.ParseDict(_parse_json(content), pb.ModelManifest()))
    except (ValueError, json_format.ParseError) as error:
        raise ManifestError(f"{where}: {one_line(error)}") from error
    found = (manifest.name, str(manifest.version))
    if found != (version_folder.parent.name, version_folder.name):
        raise ManifestError(
            f"{where}: it describes model {manifest.name!r} version {manifest.version}"
        )
    return manifest


def parse_policy(model_folder: Path, content: bytes) -> Promotion:
    """Parse the bytes of the policy in a folder NAME.

    Raises:
        ManifestError: It is malformed or of another schema.
    """
    try:
        policy = json_format.ParseDict(_parse_json(content), pb.ServingPolicy())
        _check_schema(policy.schema_version)
    except (ValueError, json_format.ParseError) as error:
        raise ManifestError(f"{policy_of(model_folder)}: {one_line(error)}") from error
    return Promotion(policy.version, tuple(policy.previous))


def parse_record(content: bytes) -> pb.CanaryRecord:
    """Parse the record of a canary's verdict.

    Raises:
        ValueError: It is malformed or of another schema.
    """
    try:
        record = json_format.ParseDict(_parse_json(content), pb.CanaryRecord())
    except json_format.ParseError as error:
        raise ValueError(one_line(error)) from error
    _check_schema(record.schema_version)
    return record


def manifest_of(version_folder: Path) -> str:
    """Return how messages name the manifest of a version."""
    return f"model {version_folder.parent.name!r} version {version_folder.name}: {MANIFEST_NAME}"


def policy_of(model_folder: Path) -> str:
    """Return how messages name the policy of a model."""
    return f"model {model_folder.name!r}: {POLICY_NAME}"


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks, and without the path of a file."""
    if isinstance(error, OSError):
        return error.strerror or "cannot be read"
    return " ".join(str(error).split())


def _check_schema(found: int) -> None:
    if found != SCHEMA_VERSION:
        raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {found}")


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
        artifacts=tuple(
            Artifact(
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
            f"input: expected UINT8 [-1, {size_px[0]}, {size_px[1]}, 3] as in the preprocessing, "
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
    interpolation = Interpolation(message.interpolation)
    if message.without_antialias and interpolation is not Interpolation.BILINEAR:
        raise ValueError("preprocessing: without_antialias: expected interpolation bilinear")
    scaled = message.decoding == pb.DECODING_SCALED
    if not scaled and message.decoding:
        raise ValueError(f"preprocessing: decoding: expected a known one, got {message.decoding}")
    if scaled and message.without_antialias:
        raise ValueError("preprocessing: without_antialias: expected no scaled decoding")
    return Preprocessing(
        message.height_px,
        message.width_px,
        shorter_px,
        interpolation,
        not message.without_antialias,
        scaled,
    )


def _file(message: pb.File) -> FileRecord:
    if not _PLAIN_FILE_NAME.fullmatch(message.name):
        raise ValueError(f"file name: expected a plain name without folders, got {message.name!r}")
    return FileRecord(message.name, message.size_bytes, message.sha256)
