"""A repository in a store, mirrored into a bounded folder of this machine.

The server reads the mirror as it reads a repository on a disk. A scan lists the store and reads
only manifests, signatures and policies whose tag changed; the other files of a version are copied
when it is loaded (`copies`). While the store is away, the last listing and the copies remain in
use, also at the start: CACHE/mirror.json keeps the listing.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from threading import Lock
from typing import TypeVar

import structlog

from convoy.server.errors import RepositoryError, UnreadableError
from convoy.server.metrics.mirror import MirrorMetrics
from convoy.server.models.copies import (
    SMALL_NAMES,
    VersionCopies,
    cache_error,
    note_loaded,
    path_in_store,
)
from convoy.server.models.manifest import MANIFEST_NAME, POLICY_NAME
from convoy.server.models.repository import (
    MAX_MANIFEST_BYTES,
    Fingerprint,
    ModelFolder,
    ModelRepository,
    is_model_name,
    is_version_number,
    no_model,
)
from convoy.server.models.store import ObjectStore, StoredFile

logger = structlog.get_logger()

Result = TypeVar("Result")
Listing = dict[str, StoredFile]

_STATE_NAME = "mirror.json"
_LOCK_NAME = "lock"


class MirroredRepository(ModelRepository):
    """A model repository whose files are in a store; see `ModelRepository`.

    The methods may be called on several threads at once.

    Args:
        store: Where the versions are.
        cache: The folder of the mirror, of this server alone.
        limit_bytes: What the copies may take, besides manifests, signatures and policies.
        metrics: Receives the metrics.
        on_error: Called with each error of a scan that is not raised, to count it.

    Raises:
        RepositoryError: The folder cannot be used, or another server uses it.
    """

    def __init__(
        self,
        store: ObjectStore,
        cache: Path,
        limit_bytes: int,
        metrics: MirrorMetrics,
        on_error: Callable[[UnreadableError], None] = lambda error: None,
    ) -> None:
        super().__init__(cache)
        self._store = store
        self._cache = cache
        self._metrics = metrics
        self._on_error = on_error
        self._reported = ""
        self._listing: Listing = {}
        # The tags of the small files when they were copied.
        self._tags: dict[str, str] = {}
        # Models with a small file that cannot be read.
        self._errors: dict[str, UnreadableError] = {}
        self._scan_lock = Lock()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(cache / _LOCK_NAME)
        except BlockingIOError as error:
            raise RepositoryError(
                f"--cache-dir: {cache} is in use by another server; each needs its own"
            ) from error
        except OSError as error:
            raise RepositoryError(f"--cache-dir: {cache}: {error.strerror}") from error
        self._copies = VersionCopies(store, cache, limit_bytes, metrics)
        self._restore()

    def close(self) -> None:
        """Release the folder."""
        os.close(self._lock)

    def check_exists(self) -> None:
        """Do nothing: a store that is away now may be there later."""

    def models(self) -> list[ModelFolder]:
        """Return the models in the store, sorted by name; those of the last listing if it fails.

        Raises:
            RepositoryError: The store holds no model, or was never listed and cannot be.
        """
        with self._scan_lock:
            try:
                self._scan()
            except UnreadableError as error:
                if not self._listing:
                    raise
                self._on_error(error)
                self._report(error)
            return self._folders()

    def fingerprint(self, folder: Path) -> Fingerprint:
        """Return a value that changes when a file of a version changes in the store."""
        start = f"{path_in_store(folder)}/"
        listing = self._listing.items()
        return tuple(sorted((path, *astuple(f)) for path, f in listing if path.startswith(start)))

    def fetch(self, folder: Path) -> None:
        """Copy the files of a version that are not here yet; see `VersionCopies.fetch`."""
        self._copies.fetch(folder, self._listing)

    def read(self, folder: Path, work: Callable[[Path], Result]) -> Result:
        """Return what `work` returns for a version, whose copies stay until then.

        Raises:
            RepositoryError: As `fetch` and `work` raise it.
        """
        with self._copies.pinned(folder):
            self.fetch(folder)
            try:
                result = work(folder)
            except RepositoryError:
                note_loaded(folder, good=False)
                raise
            note_loaded(folder, good=True)
            return result

    def _scan(self) -> None:
        """List the store and copy the small files that changed.

        Raises:
            RepositoryError: The store holds no model.
            UnreadableError: It cannot be listed, or the disk takes no copy.
        """
        found = self._store.list()
        listing = {path: file for path, file in found.items() if _is_of_repository(path)}
        if not any(path.endswith(f"/{MANIFEST_NAME}") for path in listing):
            raise no_model(self._store.shown)
        small = {path for path in listing if _is_small(path)}
        # Listings of web servers have no tags, but their files have.
        for path in small:
            if not listing[path].tag:
                listing[path] = self._store.describe(path)
        self._copy_small_files({path: listing[path] for path in small})
        self._metrics.listed.set_to_current_time()
        if self._reported:
            logger.info("the store of the repository can be read again")
            self._reported = ""
        if listing != self._listing:
            self._listing = listing
            self._remove_unlisted()
            self._save()

    def _copy_small_files(self, files: Listing) -> None:
        """Copy those whose tag changed, and those that have none."""
        changed = [
            path
            for path, file in files.items()
            if not file.tag or file.tag != self._tags.get(path) or not self._copy_of(path).exists()
        ]
        self._errors = {}
        content = self._store.read_whole(changed, MAX_MANIFEST_BYTES + 1, files)
        for path, got in content.items():
            if isinstance(got, UnreadableError):
                self._errors[path.partition("/")[0]] = got
                continue
            self._metrics.fetched_bytes.inc(len(got))
            try:
                _replace(self._copy_of(path), got)
            except OSError as error:
                raise cache_error(error) from error
            self._tags[path] = files[path].tag

    def _remove_unlisted(self) -> None:
        """Remove the copies of what is gone from the store."""
        self._tags = {path: tag for path, tag in self._tags.items() if path in self._listing}
        folders = {path.rpartition("/")[0] for path in self._listing}
        for entry in list(self._cache.glob("*/*")):
            path = f"{entry.parent.name}/{entry.name}"
            if is_version_number(entry.name) and path not in folders:
                self._copies.remove(entry)
            elif entry.name == POLICY_NAME and path not in self._listing:
                entry.unlink(missing_ok=True)

    def _folders(self) -> list[ModelFolder]:
        versions: dict[str, list[int]] = {}
        for path in self._listing:
            folder, _, name = path.rpartition("/")
            if name == MANIFEST_NAME:
                model, _, number = folder.partition("/")
                versions.setdefault(model, []).append(int(number))
        return [
            ModelFolder(self._copy_of(model), tuple(sorted(numbers)), self._errors.get(model))
            for model, numbers in sorted(versions.items())
        ]

    def _copy_of(self, path: str) -> Path:
        return self._cache / path

    def _report(self, error: UnreadableError) -> None:
        """Log once that the store is away."""
        if self._reported != str(error):
            self._reported = str(error)
            logger.error("the store cannot be read; the mirror remains in use", error=str(error))

    def _restore(self) -> None:
        """Take up the listing of an earlier process."""
        try:
            state = json.loads((self._cache / _STATE_NAME).read_text())
            listing = {path: StoredFile(int(s), str(t)) for path, (s, t) in state["files"].items()}
            self._tags = {path: str(tag) for path, tag in state["tags"].items()}
            self._listing = {
                path: file for path, file in listing.items() if _is_of_repository(path)
            }
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.warning("the last listing of the mirror cannot be used", error=str(error))

    def _save(self) -> None:
        files = {path: astuple(file) for path, file in self._listing.items()}
        content = json.dumps({"files": files, "tags": self._tags}).encode()
        try:
            _replace(self._cache / _STATE_NAME, content)
        except OSError as error:
            # The next start lists the store first, and compares the small files again.
            logger.warning("the listing cannot be saved", error=str(cache_error(error)))


def _is_of_repository(path: str) -> bool:
    """Tell whether a path is NAME/VERSION/FILE or NAME/policy.json; all others are ignored."""
    match path.split("/"):
        case [name, file]:
            return is_model_name(name) and file == POLICY_NAME
        case [name, version, _]:
            return is_model_name(name) and is_version_number(version)
    return False


def _is_small(path: str) -> bool:
    """Tell whether a file is always copied."""
    return path.count("/") == 1 or path.rpartition("/")[2] in SMALL_NAMES


def _locked(path: Path) -> int:
    """Open and lock a file; the lock ends with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_bytes(content)
    staged.replace(path)
