"""The model repository on disk: NAME/VERSION/manifest.json with the files that it names.

Models, versions and files may be symbolic links, as volumes of Kubernetes have them; those of files
must not lead out of the repository. A version that is being written has another name (the export
renames it when every byte is there), so the server does not see it. Only "no such file" means that
something is gone: after any other error of the storage the models in service stay.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from convoy.server.errors import (
    ManifestError,
    RepositoryError,
    UnreadableError,
    VerificationError,
)
from convoy.server.models.manifest import (
    MANIFEST_NAME,
    POLICY_NAME,
    FileRecord,
    Manifest,
    manifest_of,
    parse_manifest,
    parse_policy,
    policy_of,
)
from convoy.server.models.policy import Promotion

Result = TypeVar("Result")

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

# Errors that mean: it does not exist.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
# Errors that mean: it is not a file. All other errors are failures of the storage.
_NO_REGULAR_FILE = frozenset({errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO})

Fingerprint = tuple[tuple[str | int, ...], ...]
"""Name, size, modification time and inode of each file of a version, or what a store says of it."""


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """The content of a file whose digest is the manifest's."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version in the repository whose manifest was read."""

    folder: Path
    manifest: Manifest

    def read_files(self, *wanted: FileRecord) -> tuple[VerifiedFile, ...]:
        """Read the wanted files, and verify all others of the manifest as well.

        Raises:
            VerificationError: A file is missing, no regular file, or its content differs.
        """
        for record in self.manifest.files:
            if record not in wanted:
                self.verify(record)
        return tuple(map(self.read, wanted))

    def read(self, record: FileRecord) -> VerifiedFile:
        """Read a whole file and compare its digest with the manifest.

        The returned bytes are the verified ones, even if the file changes meanwhile.

        Raises:
            VerificationError: The file is missing, no regular file, or its content differs.
        """
        with self._opened(record) as file:
            content = file.read(record.size_bytes)
        self._compare(record, hashlib.sha256(content).hexdigest())
        return VerifiedFile(record.name, content)

    def verify(self, record: FileRecord) -> None:
        """Compare the digest of a file that is not loaded with the manifest.

        Raises:
            VerificationError: The file is missing, no regular file, or its content differs.
        """
        with self._opened(record) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._compare(record, digest)

    @contextmanager
    def _opened(self, record: FileRecord) -> Iterator[BufferedReader]:
        try:
            with open_regular(self.folder / record.name, repository_of(self.folder)) as file:
                found_bytes = os.fstat(file.fileno()).st_size
                if found_bytes != record.size_bytes:
                    raise VerificationError(
                        f"{self._where(record)}: expected {record.size_bytes} bytes, "
                        f"got {found_bytes}"
                    )
                yield file
        except OSError as error:
            raise read_error(VerificationError, self._where(record), error) from error

    def _compare(self, record: FileRecord, digest: str) -> None:
        if digest != record.sha256:
            raise VerificationError(
                f"{self._where(record)}: expected SHA-256 {record.sha256[:12]}…, got {digest[:12]}…"
            )

    def _where(self, record: FileRecord) -> str:
        return f"model {self.manifest.name!r} version {self.manifest.version}: {record.name}"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in the repository and the numbers of its versions; no file was opened.

    Attributes:
        error: Why the versions are unknown; None if they are known.
    """

    path: Path
    versions: tuple[int, ...]
    error: UnreadableError | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.path.name

    def promotion(self) -> Promotion | None:
        """Read which version was promoted; it may have been removed meanwhile.

        Raises:
            RepositoryError: The file cannot be read or parsed.
        """
        return read_policy(self.path)

    def check(self, promotion: Promotion) -> None:
        """Check that the promoted version is in the repository.

        Raises:
            RepositoryError: It is not.
        """
        if promotion.version not in self.versions:
            raise RepositoryError(
                f"model {self.name!r}: {POLICY_NAME} names version {promotion.version}, "
                f"found {', '.join(map(str, self.versions))}"
            )

    def version(self, number: int) -> Path:
        """Return the folder of a version."""
        return self.path / str(number)


class ModelRepository:
    """A folder of models. Anything in it that is not NAME/VERSION/manifest.json is ignored."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def check_exists(self) -> None:
        """Check that the repository is a folder; it may be empty.

        Raises:
            RepositoryError: It is not.
        """
        if not self._root.is_dir():
            raise RepositoryError(f"repository: expected a folder, got {str(self._root)!r}")

    def close(self) -> None:
        """Release the resources of the repository; a folder on disk has none."""

    def version_folder(self, model: str, version: int) -> Path:
        """Return the folder of a version."""
        return self._root / model / str(version)

    def fingerprint(self, folder: Path) -> Fingerprint:
        """Return a value that changes when a file of a version does; empty for a missing one."""
        return fingerprint(folder)

    def fetch(self, folder: Path) -> None:
        """Copy the files of a version to this machine; nothing to do for a folder on disk.

        Raises:
            RepositoryError: A file cannot be fetched, or differs from the manifest.
        """

    def read(self, folder: Path, work: Callable[[Path], Result]) -> Result:
        """Return what `work` returns for a version, whose files stay here until then.

        Raises:
            RepositoryError: As `fetch` and `work` raise it.
        """
        return work(folder)

    def models(self) -> list[ModelFolder]:
        """Return the models that have a version, sorted by name.

        It lists folders and looks for a manifest in each version, and opens no file.

        Raises:
            RepositoryError: The folder is missing or holds no model.
        """
        try:
            with os.scandir(self._root) as entries:
                found = [entry for entry in entries if is_model_name(entry.name)]
        except OSError as error:
            where = f"repository: expected a folder, got {str(self._root)!r}"
            raise read_error(RepositoryError, where, error) from error
        folders = [_model_folder(entry) for entry in sorted(found, key=lambda entry: entry.name)]
        known = [folder for folder in folders if folder.versions or folder.error]
        if not known:
            raise no_model(str(self._root))
        return known


def no_model(repository: str) -> RepositoryError:
    """Return the error of a repository without a version."""
    return RepositoryError(
        f"repository: {repository!r} holds no model "
        f"(expected NAME/VERSION/{MANIFEST_NAME}; convoy-export writes one)"
    )


def is_model_name(name: str) -> bool:
    """Tell whether a folder of the repository may be that of a model."""
    return _MODEL_NAME.fullmatch(name) is not None


def is_version_number(name: str) -> bool:
    """Tell whether a folder of a model may be that of a version."""
    return _VERSION.fullmatch(name) is not None


def repository_of(version_folder: Path) -> Path:
    """Return the repository of a folder NAME/VERSION in it."""
    return version_folder.parent.parent


def read_manifest(version_folder: Path) -> Manifest:
    """Read the manifest in a folder NAME/VERSION.

    Raises:
        ManifestError: It is missing or malformed, has another schema, or describes another version.
    """
    return parse_manifest(version_folder, read_manifest_bytes(version_folder))


def read_manifest_bytes(version_folder: Path) -> bytes:
    """Read the bytes of a manifest, which a signature is made over.

    Raises:
        ManifestError: The manifest is missing, or too large.
    """
    try:
        return read_small(version_folder / MANIFEST_NAME, repository_of(version_folder))
    except OSError as error:
        raise read_error(ManifestError, manifest_of(version_folder), error) from error
    except ValueError as error:
        raise ManifestError(f"{manifest_of(version_folder)}: {error}") from error


def read_policy(model_folder: Path) -> Promotion | None:
    """Read the policy in a folder NAME; None without one.

    Raises:
        ManifestError: The policy is malformed or of another schema.
    """
    try:
        content = read_small(model_folder / POLICY_NAME, model_folder.parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(ManifestError, policy_of(model_folder), error) from error
    except ValueError as error:
        raise ManifestError(f"{policy_of(model_folder)}: {error}") from error
    return parse_policy(model_folder, content)


def read_error(kind: type[RepositoryError], where: str, error: OSError) -> RepositoryError:
    """Return the error of reading a file: of this kind, or an UnreadableError of the storage."""
    message = f"{where}: {error.strerror or 'cannot be read'}"
    if error.errno is None or error.errno in _GONE | _NO_REGULAR_FILE:
        return kind(message)
    return UnreadableError(message, errno.errorcode.get(error.errno, str(error.errno)))


def open_regular(path: Path, root: Path) -> BufferedReader:
    """Open a regular file of a repository for reading, and nothing else in its place.

    Args:
        path: The file, in a folder below the root or in the root.
        root: The repository. A symbolic link must lead to a file in one of the folders from the
            file's up to this one, which may be links themselves.

    Raises:
        OSError: It cannot be opened, it is a folder or a device, or a link leads elsewhere.
    """
    file = open(path, "rb", opener=partial(_open_inside, root))  # noqa: SIM115  # the caller closes it
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "expected a plain file")
    except BaseException:
        file.close()
        raise
    return file


def fingerprint(folder: Path) -> Fingerprint:
    """Return a value that changes when a file of a version does; empty for a missing folder."""
    try:
        with os.scandir(folder) as entries:
            files = [(entry.name, _stat(entry)) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in files))


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    """Return the state of an entry's target, or of the link itself if it is dangling."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


def _open_inside(root: Path, path: str, flags: int) -> int:
    # Not blocking, so that a pipe in place of the file cannot block the server.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    target = Path(os.path.realpath(path, strict=True))
    folders = [folder for folder in Path(path).parents if folder.is_relative_to(root)]
    if not any(target.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise OSError(errno.ELOOP, "expected a file of the repository, got a link that leaves it")
    return os.open(target, flags)


def read_small(path: Path, root: Path) -> bytes:
    """Read a regular file of a repository, as `open_regular` opens it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than a manifest may be.
    """
    with open_regular(path, root) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"expected at most {MAX_MANIFEST_BYTES} bytes")
    return content


def _model_folder(entry: os.DirEntry[str]) -> ModelFolder:
    """List the versions in a model's folder."""
    path = Path(entry.path)
    try:
        with os.scandir(path) as entries:
            return ModelFolder(path, tuple(sorted(filter(None, map(_version, entries)))))
    except OSError as error:
        if error.errno in _GONE:  # it is not a folder, or is being removed
            return ModelFolder(path, ())
        unreadable = read_error(UnreadableError, f"model {entry.name!r}", error)
        assert isinstance(unreadable, UnreadableError)
        return ModelFolder(path, (), unreadable)


def _version(entry: os.DirEntry[str]) -> int:
    """Return the number of the version in a folder; 0 for none."""
    if not is_version_number(entry.name):
        return 0
    try:
        os.lstat(os.path.join(entry.path, MANIFEST_NAME))
    except OSError as error:
        if error.errno in _GONE:
            return 0
        raise
    return int(entry.name)
