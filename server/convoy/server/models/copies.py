"""Copies of versions on this machine, made from a store and removed to make room.

    CACHE/NAME/VERSION/manifest.json    small files, which the mirror keeps up to date
    CACHE/NAME/VERSION/…                copies: what the manifest names

A copy is used if it has the digest in the manifest. So nothing is fetched twice, even after a
restart, and a damaged copy is fetched again. An interrupted one is completed.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import structlog

from convoy.server.errors import RepositoryError, UnreadableError, VerificationError
from convoy.server.metrics.mirror import MirrorMetrics
from convoy.server.models.manifest import MANIFEST_NAME, FileRecord, Manifest
from convoy.server.models.repository import is_version_number, read_manifest
from convoy.server.models.signing import SIGNATURE_NAME
from convoy.server.models.store import ObjectStore, StoredFile

logger = structlog.get_logger()

SMALL_NAMES = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
_BLOCK_BYTES = 16 * 1024 * 1024


class VersionCopies:
    """The copies in a folder; the methods may be called on several threads at once.

    Args:
        store: Where the versions are.
        cache: The folder of the copies.
        limit_bytes: The largest size of all copies.
        metrics: Receives the metrics.
    """

    def __init__(
        self, store: ObjectStore, cache: Path, limit_bytes: int, metrics: MirrorMetrics
    ) -> None:
        self._store = store
        self._cache = cache
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        # The copies whose digest this process has verified.
        self._whole: set[tuple[Path, str]] = set()
        self._pins: Counter[Path] = Counter()
        # The whole size of each version that is being copied.
        self._incoming_bytes: dict[Path, int] = {}
        self._fetching: dict[Path, threading.Lock] = {}
        self._room_lock = threading.Lock()
        self._measure()

    @contextlib.contextmanager
    def pinned(self, folder: Path) -> Iterator[None]:
        """Keep the copies of a version during the block."""
        with self._room_lock:
            self._pins[folder] += 1
        try:
            yield
        finally:
            with self._room_lock:
                self._pins[folder] -= 1

    def fetch(self, folder: Path, listing: Mapping[str, StoredFile]) -> None:
        """Copy the files of a version that are not here yet.

        Args:
            folder: CACHE/NAME/VERSION.
            listing: What the store has.

        Raises:
            ManifestError: The manifest is missing or malformed.
            VerificationError: A file is missing, or differs from the manifest.
            UnreadableError: The store does not send a file, or the disk has no room.
            RepositoryError: The version is larger than the limit.
        """
        with self.pinned(folder), self._fetching.setdefault(folder, threading.Lock()):
            manifest = read_manifest(folder)
            records = {record.name: record for record in manifest.files}.values()
            missing = [record for record in records if not self._is_whole(folder, record)]
            for record in missing:
                _check_listed(folder, record, listing)
            if missing:
                self._make_room(manifest, folder, sum(record.size_bytes for record in records))
                try:
                    self._copy_all(manifest, folder, missing)
                finally:
                    del self._incoming_bytes[folder]

    def remove(self, folder: Path) -> None:
        """Remove a version that is gone from the store, unless it is being loaded."""
        with self._room_lock:
            if not self._pins[folder]:
                shutil.rmtree(folder, ignore_errors=True)
        self._measure()

    def _is_whole(self, folder: Path, record: FileRecord) -> bool:
        """Tell whether a copy exists and has its digest."""
        path = folder / record.name
        try:
            if path.stat().st_size == record.size_bytes:
                if (path, record.sha256) in self._whole:
                    return True
                if _digest(path) == record.sha256:
                    self._whole.add((path, record.sha256))
                    return True
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise cache_error(error) from error
        logger.warning("a copy differs from its manifest; it is fetched again", path=str(path))
        self._metrics.damaged.inc()
        return False

    def _copy_all(self, manifest: Manifest, folder: Path, records: list[FileRecord]) -> None:
        version = {"model": manifest.name, "version": manifest.version}
        logger.info("fetching", **version, size_bytes=sum(each.size_bytes for each in records))
        started_s = time.monotonic()
        try:
            for record in records:
                self._copy(folder, record)
        except OSError as error:
            raise cache_error(error) from error
        finally:
            self._measure()
        logger.info("fetched", **version, fetch_s=round(time.monotonic() - started_s, 3))

    def _copy(self, folder: Path, record: FileRecord) -> None:
        """Copy a file; resume after the bytes of an interrupted attempt."""
        partial = folder / f".{record.sha256}.partial"
        resumed = partial.exists()
        path = f"{path_in_store(folder)}/{record.name}"
        digest = self._append_rest(path, partial, record.size_bytes)
        if digest != record.sha256 and resumed:
            partial.unlink()
            digest = self._append_rest(path, partial, record.size_bytes)
        if digest != record.sha256:
            partial.unlink()
            raise VerificationError(
                f"{_where(folder, record)}: expected SHA-256 {record.sha256[:12]}…, "
                f"got {digest[:12]}…"
            )
        partial.replace(folder / record.name)
        self._whole.add((folder / record.name, record.sha256))

    def _append_rest(self, path: str, partial: Path, size_bytes: int) -> str:
        """Fetch the missing bytes of a file; return the digest of the file."""
        with partial.open("ab") as file:
            while (offset := file.tell()) < size_bytes:
                wanted_bytes = min(_BLOCK_BYTES, size_bytes - offset)
                block = self._store.read_block(path, offset, wanted_bytes)
                self._metrics.fetched_bytes.inc(len(block))
                if len(block) > wanted_bytes:  # a web server sent all of it
                    file.truncate(0)
                file.write(block)
                if len(block) != wanted_bytes:
                    break
        return _digest(partial)

    def _make_room(self, manifest: Manifest, folder: Path, size_bytes: int) -> None:
        """Remove copies of other versions until this one fits, the least recently loaded first.

        The room is kept for it while it is copied.

        Raises:
            RepositoryError: It is larger than the limit.
            UnreadableError: The others are all being loaded.
        """
        where = f"model {manifest.name!r} version {manifest.version}: --cache-mib"
        if size_bytes > self._limit_bytes:
            raise RepositoryError(
                f"{where}: expected at least {size_bytes / 2**20:.1f}, "
                f"got {self._limit_bytes / 2**20:g}"
            )
        with self._room_lock:
            sizes = {
                each: self._incoming_bytes.get(each) or _size_bytes(each)
                for each in self._versions()
                if each != folder
            }
            room_bytes = self._limit_bytes - sum(sizes.values())
            for other in sorted(sizes, key=_last_loaded_s):
                if room_bytes < size_bytes and sizes[other] and not self._pins[other]:
                    self._evict(other)
                    room_bytes += sizes[other]
            if room_bytes < size_bytes:
                raise UnreadableError(f"{where}: versions that are being loaded take it", "ENOSPC")
            self._incoming_bytes[folder] = size_bytes

    def _evict(self, folder: Path) -> None:
        logger.info("copies removed", model=folder.parent.name, version=int(folder.name))
        self._metrics.evicted.inc()
        for file in _copies_in(folder):
            file.unlink(missing_ok=True)

    def _versions(self) -> list[Path]:
        return [path for path in self._cache.glob("*/*") if is_version_number(path.name)]

    def _measure(self) -> None:
        self._metrics.copies_bytes.set(sum(map(_size_bytes, self._versions())))


def path_in_store(folder: Path) -> str:
    """Return NAME/VERSION of a version's folder."""
    return f"{folder.parent.name}/{folder.name}"


def cache_error(error: OSError) -> UnreadableError:
    """Return the error of a disk that cannot write or read the copies."""
    code = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return UnreadableError(f"--cache-dir: {error.strerror or 'cannot be written'}", code)


def note_loaded(folder: Path, *, good: bool) -> None:
    """Remember when a version was loaded; a rejected one is the first to be removed."""
    at_s = time.time() if good else 0
    with contextlib.suppress(OSError):
        os.utime(folder, (at_s, at_s))


def _last_loaded_s(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _check_listed(folder: Path, record: FileRecord, listing: Mapping[str, StoredFile]) -> None:
    """Compare the store's size of a file with the manifest before it is fetched."""
    found = listing.get(f"{path_in_store(folder)}/{record.name}")
    if found is None:
        raise VerificationError(f"{_where(folder, record)}: No such file in the store")
    if found.size_bytes not in (-1, record.size_bytes):
        raise VerificationError(
            f"{_where(folder, record)}: expected {record.size_bytes} bytes, got {found.size_bytes}"
        )


def _where(folder: Path, record: FileRecord) -> str:
    return f"model {folder.parent.name!r} version {folder.name}: {record.name}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copies_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name not in SMALL_NAMES]
    except OSError:  # it was removed meanwhile
        return []


def _size_bytes(folder: Path) -> int:
    total_bytes = 0
    for path in _copies_in(folder):
        with contextlib.suppress(OSError):
            total_bytes += path.stat().st_size
    return total_bytes
