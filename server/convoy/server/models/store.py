"""Read a repository in an object store or on a web server: s3://, gs://, az://, https:// (fsspec).

Each request has a time limit of its own, because the libraries behind fsspec wait for minutes, and
some for ever. What fails is an UnreadableError: it does not mean that anything is gone.
"""

import errno
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from convoy.server.errors import RepositoryError, UnreadableError

Result = TypeVar("Result")

_LISTING_TIMEOUT_S = 20.0
# Long enough for a block of 16 MiB at 300 KB/s.
_READ_TIMEOUT_S = 60.0
# Abandoned requests are among them: a store that never answers shall not fill the process with
# threads.
_MOST_REQUESTS = 8
# Where a store's description of a file says that its content changed.
_TAGS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "updated", "mtime")

# Libraries raise these without a number.
_CODES: Mapping[type[Exception], str] = {
    FileNotFoundError: "ENOENT",
    PermissionError: "EACCES",
    TimeoutError: "ETIMEDOUT",
}


def is_url(repository: str) -> bool:
    """Tell whether a repository is a URL, not a folder."""
    return "://" in repository


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a store says about a file.

    Attributes:
        size_bytes: Its size; -1 if the store does not say.
        tag: Changes with its content; empty if the store has nothing of the kind.
    """

    size_bytes: int
    tag: str


class ObjectStore:
    """A folder in a store; all paths are relative to it.

    Args:
        url: Of the folder.
        listing_timeout_s: How long a listing may take.
        read_timeout_s: How long one read may take.

    Raises:
        RepositoryError: The URL has an unknown scheme, or its package is not installed.
    """

    def __init__(
        self,
        url: str,
        listing_timeout_s: float = _LISTING_TIMEOUT_S,
        read_timeout_s: float = _READ_TIMEOUT_S,
    ) -> None:
        self.shown = without_secrets(url)
        self._secret = secret_of(url)
        self._listing_timeout_s = listing_timeout_s
        self._read_timeout_s = read_timeout_s
        self._free = threading.BoundedSemaphore(_MOST_REQUESTS)
        try:
            from fsspec.core import url_to_fs

            # Listings that fsspec keeps would hide new versions.
            self._files, root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or error.name or "fsspec"
            raise RepositoryError(
                f"--repository: {self.shown} needs the package {package}: "
                "pip install 'convoy-serving[cloud]'"
            ) from error
        except ValueError as error:  # of fsspec and of the libraries for the options in a URL
            raise RepositoryError(
                f"--repository: {self.shown}: {' '.join(str(error).split())}"
            ) from error
        self._root = root.rstrip("/")

    def list(self) -> dict[str, StoredFile]:
        """Return all files below the folder, by path; nothing is read.

        Raises:
            UnreadableError: The store does not list them.
        """

        def find(files: Any) -> Mapping[str, Mapping[str, Any]]:
            found: Mapping[str, Mapping[str, Any]] = files.find(self._root, detail=True)
            return found

        found = self._ask(f"cannot list {self.shown}", self._listing_timeout_s, find)
        start = self._root + "/"
        return {
            path.removeprefix(start): _described(info)
            for path, info in found.items()
            if path.startswith(start)
        }

    def describe(self, path: str) -> StoredFile:
        """Return what the store says about one file.

        Raises:
            UnreadableError: It does not say.
        """
        where = f"cannot read {self.shown}/{path}"
        info = self._ask(where, self._read_timeout_s, lambda files: files.info(self._at(path)))
        return _described(info)

    def read_whole(
        self, paths: Sequence[str], limit_bytes: int, listing: Mapping[str, StoredFile]
    ) -> dict[str, bytes | UnreadableError]:
        """Read small files, several at a time; those that are gone are left out.

        Args:
            paths: Of the files.
            limit_bytes: Of a larger file, only so much is read.
            listing: The files' sizes.

        Raises:
            UnreadableError: The store does not answer.
        """
        small = [path for path in paths if listing[path].size_bytes <= limit_bytes]
        full = {self._at(path): path for path in small}

        def read(files: Any) -> Mapping[str, bytes | Exception]:
            found: Mapping[str, bytes | Exception] = files.cat(list(full), on_error="return")
            return found

        found = self._ask(f"cannot read {self.shown}", self._read_timeout_s, read) if full else {}
        content: dict[str, bytes | UnreadableError] = {}
        for path, got in found.items():
            if isinstance(got, bytes):
                content[full[path]] = got
            elif not _is_gone(got):
                content[full[path]] = self._unreadable(
                    f"cannot read {self.shown}/{full[path]}", got
                )
        for path in set(paths) - set(small):
            content[path] = self.read_block(path, 0, limit_bytes)
        return content

    def read_block(self, path: str, offset: int, size_bytes: int) -> bytes:
        """Read a part of a file; a web server that knows no parts sends all of it.

        Raises:
            UnreadableError: It cannot be read.
        """
        where, end = f"cannot read {self.shown}/{path}", offset + size_bytes
        content: bytes = self._ask(
            where,
            self._read_timeout_s,
            lambda files: files.cat_file(self._at(path), start=offset, end=end),
        )
        return content

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _ask(self, what: str, timeout_s: float, request: Callable[[Any], Result]) -> Result:
        """Return what a request to the store returns.

        Raises:
            UnreadableError: It failed, or took too long; its thread is abandoned then. It is not
                made while too many others have no answer.
        """
        if not self._free.acquire(timeout=timeout_s):
            raise UnreadableError(f"{what}: earlier requests have no answer", "ETIMEDOUT")
        answers: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((request(self._files), None))
            # Each of fsspec's file systems raises errors of its own library.
            except Exception as error:
                answers.put((None, error))
            finally:
                self._free.release()

        threading.Thread(target=run, name="object-store", daemon=True).start()
        try:
            result, error = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise UnreadableError(f"{what}: no answer in {timeout_s:g} s", "ETIMEDOUT") from None
        if error:
            raise self._unreadable(what, error)
        return result  # type: ignore[return-value]  # None only with an error

    def _unreadable(self, what: str, error: Exception) -> UnreadableError:
        cause = _cause(error)
        if isinstance(cause, OSError) and cause.errno:
            code = errno.errorcode.get(cause.errno, type(cause).__name__)
        else:
            code = _CODES.get(type(cause), type(cause).__name__)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        if self._secret:
            reason = reason.replace(self._secret, "")
        return UnreadableError(f"{what}: {' '.join(reason.split())[:300]}", code)


def _described(info: Mapping[str, Any]) -> StoredFile:
    size = info.get("size")
    tag = next((str(info[field]) for field in _TAGS if info.get(field)), "")
    return StoredFile(-1 if size is None else int(size), tag)


def _is_gone(error: Exception) -> bool:
    cause = _cause(error)
    return isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404


def _cause(error: Exception) -> Exception:
    # fsspec reports whatever fails on the web as a missing file.
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__ if hasattr(error.__cause__, "status") else error
    return error


def without_secrets(url: str) -> str:
    """Return a URL without user, password and query, for messages."""
    parts = urlsplit(url)
    host = parts.netloc.removeprefix(secret_of(url))
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def secret_of(url: str) -> str:
    """Return "USER:PASSWORD@" of a URL; what else stands before an @ is a container of Azure."""
    before, at, _ = urlsplit(url).netloc.rpartition("@")
    return before + at if ":" in before else ""
