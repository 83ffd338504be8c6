"""The model repository on disk: NAME/VERSION/manifest.json with the files it names beside it.

Nothing in it may be a link: neither a model, nor a version, nor a file. A version that is being
written has another name (export renames it when every byte is there), so it is not seen.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from server.errors import RepositoryError, VerificationError
from server.files import open_plain
from server.manifest import MANIFEST_NAME, POLICY_NAME, FileRecord, Manifest, read_policy
from server.policy import Promotion

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Name, size, modification time and inode of each file of a version."""


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file's bytes, which are those that the manifest vouches for."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version in the repository whose manifest was read."""

    folder: Path
    manifest: Manifest

    def read_files(self, *wanted: FileRecord) -> tuple[VerifiedFile, ...]:
        """Reads those that are loaded, and compares all others with the manifest as well.

        Raises:
            VerificationError: A file is missing, no plain file, or its content differs.
        """
        for record in self.manifest.files:
            if record not in wanted:
                self.verify(record)
        return tuple(map(self.read, wanted))

    def read(self, record: FileRecord) -> VerifiedFile:
        """Reads a file whole and compares what was read with the manifest.

        Whoever loads from these bytes loads what was verified, whatever is written meanwhile.

        Raises:
            VerificationError: The file is missing, no plain file, or its content differs.
        """
        with self._opened(record) as file:
            content = file.read(record.size_bytes)
        self._compare(record, hashlib.sha256(content).hexdigest())
        return VerifiedFile(record.name, content)

    def verify(self, record: FileRecord) -> None:
        """Compares a file that nobody loads with the manifest.

        Raises:
            VerificationError: The file is missing, no plain file, or its content differs.
        """
        with self._opened(record) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._compare(record, digest)

    @contextmanager
    def _opened(self, record: FileRecord) -> Iterator[BufferedReader]:
        try:
            with open_plain(self.folder / record.name) as file:
                found_bytes = os.fstat(file.fileno()).st_size
                if found_bytes != record.size_bytes:
                    raise VerificationError(
                        f"{self._where(record)}: expected {record.size_bytes} bytes, "
                        f"got {found_bytes}"
                    )
                yield file
        except OSError as error:
            raise VerificationError(f"{self._where(record)}: {error.strerror}") from error

    def _compare(self, record: FileRecord, digest: str) -> None:
        if digest != record.sha256:
            raise VerificationError(
                f"{self._where(record)}: expected SHA-256 {record.sha256[:12]}…, got {digest[:12]}…"
            )

    def _where(self, record: FileRecord) -> str:
        return f"model {self.manifest.name!r} version {self.manifest.version}: {record.name}"


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
