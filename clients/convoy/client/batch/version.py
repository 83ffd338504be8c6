"""A published model version on disk: its manifest, and files that match the manifest."""

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format

from convoy.client.batch.errors import VersionError
from convoy.v1 import model_manifest_pb2 as pb

MANIFEST_NAME = "manifest.json"
POLICY_NAME = "policy.json"
SCHEMA_VERSION = 1
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

M = TypeVar("M", pb.ModelManifest, pb.ServingPolicy)


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version whose manifest was read.

    Attributes:
        folder: The folder of its files.
        onnx: The float32 ONNX artifact.
    """

    folder: Path
    manifest: pb.ModelManifest
    onnx: pb.Artefact

    def __str__(self) -> str:
        return f"model {self.manifest.name!r} version {self.manifest.version}"

    def verified(self, file: pb.File) -> bytes:
        """Read a file after comparing it with the manifest.

        Raises:
            VersionError: It is missing, or its SHA-256 differs.
        """
        path = self.folder / file.name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise VersionError(f"{self}: {file.name}: expected a plain file")
            content = path.read_bytes()
        except OSError as error:
            raise VersionError(f"{self}: {file.name}: {error.strerror}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            raise VersionError(
                f"{self}: {file.name}: expected SHA-256 {file.sha256[:12]}…, got {digest[:12]}…"
            )
        return content


def find_version(repository: Path, model: str, version: int) -> ModelVersion:
    """Find a version as a server would.

    Args:
        repository: A model repository, or the folder of one version.
        model: Its name; may be empty if there is only one.
        version: 0 for the one that the policy names, or the newest.

    Raises:
        VersionError: There is none, or its manifest cannot be used.
    """
    if (repository / MANIFEST_NAME).is_file():
        found = _read(repository)
        if (model and model != found.manifest.name) or version not in (0, found.manifest.version):
            raise VersionError(f"--repository: {repository} holds {found}")
        return found
    folder = _model_folder(repository, model)
    found = _read(folder / str(version or _served_version(folder)))
    if (found.manifest.name, str(found.manifest.version)) != (folder.name, found.folder.name):
        raise VersionError(f"{found.folder}: {MANIFEST_NAME} describes {found}")
    return found


def _model_folder(repository: Path, model: str) -> Path:
    names = sorted({path.parent.parent.name for path in repository.glob(f"*/*/{MANIFEST_NAME}")})
    if model in names:
        return repository / model
    if not model and len(names) == 1:
        return repository / names[0]
    raise VersionError(
        f"--model: expected one of {', '.join(names) or f'none, {repository} is empty'}, "
        f"got {model!r}"
    )


def _served_version(folder: Path) -> int:
    if (folder / POLICY_NAME).exists():
        return _parse(folder / POLICY_NAME, pb.ServingPolicy()).version
    versions = [path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}")]
    return max(int(name) for name in versions if _VERSION.fullmatch(name))


def _read(folder: Path) -> ModelVersion:
    manifest = _parse(folder / MANIFEST_NAME, pb.ModelManifest())
    onnx = [a for a in manifest.artefacts if a.format == pb.ARTEFACT_FORMAT_ONNX]
    if not onnx:
        raise VersionError(f"{folder}: expected an ONNX artifact, found none")
    # The float32 artifact of each format is listed first.
    for file in (onnx[0].file, manifest.samples.file):
        if not _PLAIN_FILE_NAME.fullmatch(file.name):
            raise VersionError(f"{folder}: expected a plain file name, got {file.name!r}")
    return ModelVersion(folder, manifest, onnx[0])


def _parse(path: Path, message: M) -> M:
    try:
        json_format.ParseDict(json.loads(path.read_text(encoding="utf-8")), message)
    except OSError as error:
        raise VersionError(f"{path}: {error.strerror}") from error
    except (ValueError, json_format.ParseError) as error:
        raise VersionError(f"{path}: {' '.join(str(error).split())}") from error
    if message.schema_version != SCHEMA_VERSION:
        raise VersionError(
            f"{path}: schema_version: expected {SCHEMA_VERSION}, got {message.schema_version}"
        )
    return message
