"""Files by URL: https://, s3://, gs:// and whatever else fsspec opens (extra `cloud`).

A name that contains `://` is a URL, any other a path on this machine. A request that fails is
repeated, because web servers and object stores fail now and then; if it still fails, it raises an
OSError, as on a disk.
"""

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

_ATTEMPTS = 3
_FIRST_WAIT_S = 0.2
_BLOCK_BYTES = 4 * 1024 * 1024
_BUFFER_BYTES = 128 * 1024
_WEB = ("http://", "https://")
# Where a store's description of a file says that its content changed.
_CHANGING = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "updated", "mtime")
# Errors that a retry cannot repair, and HTTP statuses that it may.
_FINAL = (
    FileNotFoundError,
    ImportError,
    IsADirectoryError,
    NotImplementedError,
    PermissionError,
    ValueError,
)
_PASSING_STATUS = (408, 429)

# Of the web any user, of other stores one with a password: Azure has a container there.
_USER = re.compile(r"(https?://)[^/?#\s]*@|(?<=://)[^/?#\s@:]*:[^/?#\s]*@", re.IGNORECASE)
# Up to what may follow a URL in a message: a quote, a bracket, a colon.
_QUERY = re.compile(r"(https?://[^\s?#'\"]*)\?\S*?(?=[:'\"),;]*(?:\s|$))", re.IGNORECASE)


def is_url(name: str) -> bool:
    """Tell whether a name is a URL."""
    return "://" in name


def is_web(name: str) -> bool:
    """Tell whether a name is the URL of a web server: it has neither folders nor patterns."""
    return name.startswith(_WEB)


def without_query(name: str) -> str:
    """Return a name without the query of a web server's URL."""
    return name.partition("?")[0] if is_web(name) else name


def without_secrets(text: str) -> str:
    """Return a name or a message whose URLs have neither user nor password nor a web query."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text)) if "://" in text else text


def shown(name: str) -> str:
    """Return a name for messages, rows and summaries."""
    return without_secrets(without_query(name)) if is_url(name) else name


def identity(name: str) -> str:
    """Return a name that differs from those of other files, without secrets in clear."""
    query = name.partition("?")[2] if is_web(name) else ""
    digest = f"?sha256={hashlib.sha256(query.encode()).hexdigest()[:16]}" if query else ""
    return shown(name) + digest


def open_binary(name: str) -> IO[bytes]:
    """Open a file for reading at any position.

    Raises:
        OSError: It cannot be opened; a later read may raise it too.
    """
    if is_url(name):
        return io.BufferedReader(_RemoteFile(name), _BUFFER_BYTES)
    return open(name, "rb")


def read_bytes(url: str, most_bytes: int) -> bytes | None:
    """Read a whole file; None if it is larger than `most_bytes`, of which no more is read.

    Raises:
        OSError: It cannot be read.
    """
    read = _web_start if is_web(url) else _stored_start
    content = _asked(url, lambda files, path: read(files, path, most_bytes + 1))
    return content if len(content) <= most_bytes else None


def describe(name: str) -> Mapping[str, object]:
    """Return a file's size, and what changes with its content: its time, or a store's ETag.

    Raises:
        OSError: There is no such file.
    """
    if not is_url(name):
        found = os.stat(name)
        return {"size_bytes": found.st_size, "modified_ns": found.st_mtime_ns}
    info = _asked(name, lambda files, path: files.info(path))
    changing = next((info[field] for field in _CHANGING if info.get(field)), "")
    return {"size_bytes": info.get("size"), "changing": str(changing)}


def exists(url: str) -> bool:
    """Tell whether there is such a file or folder.

    Raises:
        OSError: The server does not say.
    """
    return bool(_asked(url, lambda files, path: files.exists(path)))


def is_file(url: str) -> bool:
    """Tell whether there is such a file; whatever else a store has is a folder.

    Raises:
        OSError: There is no such store.
    """
    return is_web(url) or bool(_asked(url, lambda files, path: files.isfile(path)))


def names_matching(pattern: str) -> list[str]:
    """Return the URLs that a glob pattern matches, sorted.

    Raises:
        OSError: The store does not list them.
    """
    return _asked(
        pattern, lambda files, path: sorted(map(files.unstrip_protocol, files.glob(path)))
    )


def describe_error(error: Exception) -> str:
    """Return why a file cannot be read, on one line and without its name."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(without_secrets(str(reason)).split())


class UrlFolder:
    """A folder of an object store.

    Its files appear and are replaced as wholes: no reader sees half of one.

    Args:
        url: Of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def names(self) -> list[str]:
        """Return the paths in the folder of all files below it, sorted; none without the folder.

        Raises:
            OSError: The store does not list them.
        """

        def find(files: Any, path: str) -> list[str]:
            start = path + "/"
            return sorted(
                found.removeprefix(start) for found in files.find(path) if found.startswith(start)
            )

        return _asked(self.url, find)

    def content(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            OSError: It cannot be read.
        """
        content: bytes = self._ask(name, lambda files, path: files.cat_file(path))
        return content

    def put(self, name: str, content: bytes) -> None:
        """Write or replace a file.

        Raises:
            OSError: It cannot be written.
        """
        self._ask(name, lambda files, path: files.pipe_file(path, content))

    def read(self, names: Iterable[str], folder: Path) -> None:
        """Copy files to a folder of this machine.

        Raises:
            OSError: One cannot be copied.
        """
        for name in names:
            self._copy_from(name, folder / name)

    def write(self, files: Iterable[Path]) -> None:
        """Copy files of this machine to the folder.

        Raises:
            OSError: One cannot be copied.
        """
        for file in files:
            self._copy_to(file)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, in their order.

        Raises:
            OSError: One cannot be removed.
        """
        for name in names:
            self._ask(name, lambda files, path: files.rm_file(path))

    def _copy_from(self, name: str, to: Path) -> None:
        self._ask(name, lambda files, path: files.get_file(path, str(to)))

    def _copy_to(self, file: Path) -> None:
        self._ask(file.name, lambda files, path: files.put_file(str(file), path))

    def _ask(self, name: str, request: Callable[[Any, str], T]) -> T:
        return _asked(f"{self.url}/{name}", request)


class _RemoteFile(io.RawIOBase):
    """A file at a URL, read in blocks."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._file = _asked(url, _opened)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        # A failed read leaves the position as it was.
        content = _repeated(self._url, lambda: self._file.read(len(view)))
        view[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(_repeated(self._url, lambda: self._file.seek(offset, whence)))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _web_start(files: Any, path: str, most_bytes: int) -> bytes:
    """Read the start of a web server's file; one request, also where it answers no ranges."""
    content = io.BytesIO()
    # Without blocks the file is a stream; with a size, fsspec does not ask for one first.
    with files.open(path, "rb", block_size=0, size=1) as stream:
        while content.tell() < most_bytes and (
            block := stream.read(min(_BLOCK_BYTES, most_bytes - content.tell()))
        ):
            content.write(block)
    return content.getvalue()


def _stored_start(files: Any, path: str, most_bytes: int) -> bytes:
    try:
        content: bytes = files.cat_file(path, start=0, end=most_bytes)
    except Exception:
        # An empty file has no range.
        if files.size(path) == 0:
            return b""
        raise
    return content


def _opened(files: Any, path: str) -> Any:
    return files.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")


def _asked(url: str, request: Callable[[Any, str], T]) -> T:
    """Return what a request to the URL's file system returns.

    Raises:
        OSError: It fails for good.
    """

    def ask() -> T:
        from fsspec.core import url_to_fs

        # A listing that fsspec kept would hide newer files.
        return request(*url_to_fs(url, use_listings_cache=False))

    return _repeated(url, ask)


def _repeated(url: str, call: Callable[[], T]) -> T:
    wait_s = _FIRST_WAIT_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        # Each of fsspec's file systems raises errors of its own: of aiohttp, botocore and so on.
        except Exception as error:
            if attempt == _ATTEMPTS or _is_final(url, error):
                raise _as_os_error(url, error) from error
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("the last attempt returns or raises")


def _is_final(url: str, error: Exception) -> bool:
    cause = _cause(url, error)
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _PASSING_STATUS
    return isinstance(cause, _FINAL)


def _as_os_error(url: str, error: Exception) -> OSError:
    cause = _cause(url, error)
    if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(url))
    if isinstance(cause, ImportError):
        needed = getattr(cause.__cause__, "name", None) or cause.name or str(cause)
        return OSError(f"needs the package {needed}: pip install 'convoy-serving[cloud]'")
    return OSError(describe_error(cause))


def _cause(url: str, error: Exception) -> Exception:
    # fsspec reports whatever fails on the web as a missing file.
    if is_web(url) and isinstance(error, FileNotFoundError):
        return error.__cause__ if isinstance(error.__cause__, Exception) else error
    return error
