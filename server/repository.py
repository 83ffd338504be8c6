"""The model repository on disk: NAME/VERSION/manifest.json with the files it names beside it."""

import hashlib
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from server.errors import RepositoryError, VerificationError
from server.manifest import (
    MANIFEST_NAME,
    POLICY_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    read_policy,
)

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version in the repository whose manifest was read."""

    folder: Path
    manifest: Manifest

    def verified_file(self, record: FileRecord) -> Path:
        """Returns the path of a file after comparing its content with the manifest.

        Raises:
            VerificationError: The file is missing, no plain file, or its content differs.
        """
        path = self.folder / record.name
        where = f"model {self.manifest.name!r} version {self.manifest.version}: {record.name}"
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise VerificationError(f"{where}: expected a plain file")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise VerificationError(f"{where}: {error.strerror}") from error
        if digest != record.sha256:
            raise VerificationError(
                f"{where}: expected SHA-256 {record.sha256[:12]}…, got {digest[:12]}…"
            )
        return path


class ModelRepository:
    """A folder of models. Everything that is not NAME/VERSION/manifest.json is left alone."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def served_versions(self) -> list[ModelVersion]:
        """Returns the version of every model that shall be served, sorted by name.

        That is the one which the model's policy file names, or the newest where there is none.

        Raises:
            RepositoryError: The folder is missing or holds no model, or a policy names a version
                that is not there.
            ManifestError: The manifest of a version to serve cannot be used.
        """
        if not self._root.is_dir():
            raise RepositoryError(f"repository: expected a folder, got {str(self._root)!r}")
        chosen = [_chosen(versions) for model in self._models() if (versions := _versions(model))]
        if not chosen:
            raise RepositoryError(
                f"repository: {str(self._root)!r} holds no model "
                f"(expected NAME/VERSION/{MANIFEST_NAME}; convoy-export writes one)"
            )
        return [ModelVersion(folder, read_manifest(folder)) for folder in chosen]

    def _models(self) -> list[Path]:
        return sorted(path for path in self._root.iterdir() if _MODEL_NAME.fullmatch(path.name))


def _chosen(versions: list[Path]) -> Path:
    model = versions[-1].parent
    version = read_policy(model)
    if version is None:
        return versions[-1]
    chosen = model / str(version)
    if chosen not in versions:
        raise RepositoryError(
            f"model {model.name!r}: {POLICY_NAME} names version {version}, "
            f"found {', '.join(path.name for path in versions)}"
        )
    return chosen


def _versions(model: Path) -> list[Path]:
    if not model.is_dir() or model.is_symlink():
        return []
    versions = [
        path
        for path in model.iterdir()
        if _VERSION.fullmatch(path.name)
        and not path.is_symlink()
        and (path / MANIFEST_NAME).is_file()
    ]
    return sorted(versions, key=lambda path: int(path.name))
