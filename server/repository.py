"""The model repository on disk: NAME/VERSION/manifest.json with the files it names beside it.

Nothing in it may be a link: neither a model, nor a version, nor a file. A version that is being
written has another name (export renames it when every byte is there), so it is not seen.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from server.errors import RepositoryError, VerificationError
from server.manifest import MANIFEST_NAME, POLICY_NAME, FileRecord, Manifest, read_policy
from server.policy import Promotion

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, size, modification time and inode of each file of a version."""


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

    def verify_files(self) -> None:
        """Compares every file with the manifest, those that are not loaded too.

        Raises:
            VerificationError: One is missing, no plain file, or its content differs.
        """
        for record in self.manifest.files:
            self.verified_file(record)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in the repository: the numbers of its versions, none of them opened yet."""

    path: Path
    versions: tuple[int, ...]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.path.name

    def promotion(self) -> Promotion | None:
        """Reads which version was promoted.

        Raises:
            RepositoryError: The file cannot be used, or the version is not there.
        """
        promotion = read_policy(self.path)
        if promotion and promotion.version not in self.versions:
            raise RepositoryError(
                f"model {self.name!r}: {POLICY_NAME} names version {promotion.version}, "
                f"found {', '.join(map(str, self.versions))}"
            )
        return promotion

    def version(self, number: int) -> Path:
        """Returns the folder of a version."""
        return self.path / str(number)


class ModelRepository:
    """A folder of models. Everything that is not NAME/VERSION/manifest.json is left alone."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def version_folder(self, model: str, version: int) -> Path:
        """Returns where a version lies."""
        return self._root / model / str(version)

    def models(self) -> list[ModelFolder]:
        """Returns the models that have a version, sorted by name.

        It lists folders and looks for a manifest in each version, and opens no file.

        Raises:
            RepositoryError: The folder is missing or holds no model.
        """
        try:
            with os.scandir(self._root) as entries:
                names = sorted(
                    entry.name
                    for entry in entries
                    if _MODEL_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
                )
        except OSError as error:
            raise RepositoryError(
                f"repository: expected a folder, got {str(self._root)!r}: {error.strerror}"
            ) from error
        folders = [ModelFolder(self._root / name, _versions(self._root / name)) for name in names]
        found = [folder for folder in folders if folder.versions]
        if not found:
            raise RepositoryError(
                f"repository: {str(self._root)!r} holds no model "
                f"(expected NAME/VERSION/{MANIFEST_NAME}; convoy-export writes one)"
            )
        return found


def fingerprint(folder: Path) -> Fingerprint:
    """Returns what changes when a file of a version does; empty where the folder is gone."""
    try:
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in files))


def _versions(model: Path) -> tuple[int, ...]:
    try:
        with os.scandir(model) as entries:
            numbers = [
                int(entry.name)
                for entry in entries
                if _VERSION.fullmatch(entry.name)
                and entry.is_dir(follow_symlinks=False)
                and os.path.lexists(os.path.join(entry.path, MANIFEST_NAME))
            ]
    except OSError:  # it went away, or it is being removed
        return ()
    return tuple(sorted(numbers))
