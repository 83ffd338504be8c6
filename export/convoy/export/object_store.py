"""A model repository in an object store, by fsspec (extra `cloud`).

A store has no locks and no renames, but it writes a file only if there is none (an exclusive write,
If-None-Match in S3). A version is published in this order:

    URL/NAME/VERSION/claim.json      an exclusive write: nobody else takes the number
    URL/NAME/VERSION/…               the files
    URL/NAME/VERSION/manifest.json   an exclusive write: from now on the version exists

Claims stay, since a slow exporter may try a number that was free when it looked. The number of an
export that failed stays unused.
"""

import atexit
import contextlib
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from convoy.export.errors import ExportError, InputError, PublishError, one_line
from convoy.export.repository import (
    MANIFEST_NAME,
    POLICY_NAME,
    PolicyChange,
    Seal,
    check_name,
    failures_reported,
    is_version_number,
    parse_policy,
    policy_json,
)
from convoy.v1 import model_manifest_pb2 as pb

Result = TypeVar("Result")

_CLAIM_NAME = "claim.json"
_MOST_ATTEMPTS = 100
_READ_ONLY = ("http://", "https://")
# Codes of S3 for a condition that does not hold, and for two such writes at once.
_LOST = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The versions of one model in a repository at a URL.

    Raises:
        InputError: The name is not allowed.
    """

    repository: str
    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def _shown(self) -> str:
        return f"repository {without_secrets(self.repository)}"

    def versions(self) -> list[int]:
        """Return the existing version numbers in ascending order.

        Raises:
            InputError: The store cannot be read.
        """
        paths = self._paths()
        return sorted(number for number in _numbers(paths) if f"{number}/{MANIFEST_NAME}" in paths)

    def location(self, version: int) -> str:
        """Return the URL of a version."""
        return f"{without_secrets(self.repository)}/{self.name}/{version}"

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Yield a folder of this machine to build a version in; it is deleted afterwards.

        Raises:
            InputError: The store cannot be read, or is a web server.
        """
        self._check_writable()
        # Before the proof, which takes minutes.
        self.versions()
        with tempfile.TemporaryDirectory(prefix="convoy-export-") as folder:
            staged = Path(folder)
            with failures_reported(staged):
                yield staged

    def publish(self, staged: Path, seal: Seal) -> int:
        """Copy a staged folder to the store as the next version and return its number.

        Args:
            staged: From `stage`, with every file except those that `seal` writes.
            seal: Called with the folder and the number when both are final.

        Raises:
            PublishError: The store cannot be written, or ignores exclusive writes; nothing was
                published.
        """
        version = self._claim()
        try:
            with failures_reported(staged):
                seal(staged, version)
            files = [file for file in sorted(staged.iterdir()) if file.name != MANIFEST_NAME]
            for file in files:
                self._put(f"{version}/{file.name}", file)
            manifest = (staged / MANIFEST_NAME).read_bytes()
            if not self._create(f"{version}/{MANIFEST_NAME}", manifest):
                raise PublishError(f"{self.location(version)}: another program published it")
        except ExportError as error:
            try:
                self._remove_files(version)
            except (ExportError, FileNotFoundError):
                raise PublishError(
                    f"{error}; files may remain in {self.location(version)}"
                ) from error
            raise
        return version

    def read_policy(self) -> pb.ServingPolicy | None:
        """Return the policy, or None if the newest version is served.

        Raises:
            InputError: It is malformed, or cannot be read.
        """
        content = self._read(POLICY_NAME)
        return parse_policy(self.name, content) if content is not None else None

    def change_policy(self, change: PolicyChange) -> pb.ServingPolicy:
        """Replace the policy, and return the new one.

        In S3 the write fails if somebody else replaced the policy meanwhile, and is repeated with
        theirs. Other stores keep the last one written.

        Raises:
            InputError: The store cannot be read, or is a web server.
            PublishError: It cannot be written.
        """
        self._check_writable()
        for _ in range(_MOST_ATTEMPTS):
            tag = self._tag(POLICY_NAME)
            before = self.read_policy()
            after = change(before)
            content = policy_json(after)
            if before is None:
                if self._create(POLICY_NAME, content):
                    return after
            elif self._replace(POLICY_NAME, content, tag):
                return after
        raise PublishError(f"model {self.name!r}: {POLICY_NAME}: others keep replacing it")

    def _claim(self) -> int:
        """Take the next number."""
        claim = {
            "claimed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "claimed_by": f"{socket.gethostname()}, process {os.getpid()}",
            "token": uuid.uuid4().hex,
        }
        content = json.dumps(claim, indent=2).encode() + b"\n"
        version = max(_numbers(self._paths()), default=0) + 1
        for _ in range(_MOST_ATTEMPTS):
            path = f"{version}/{_CLAIM_NAME}"
            if self._create(path, content):
                if self._write(path, content, mode="create"):
                    raise PublishError(
                        f"{self._shown}: the store ignores exclusive writes (If-None-Match), so "
                        "two exports could take one number"
                    )
                # Another tool may have copied a version here since the numbers were read.
                if {p for p in self._paths() if p.startswith(f"{version}/")} == {path}:
                    return version
            version += 1
        raise PublishError(f"model {self.name!r}: others keep taking the next version number")

    def _create(self, path: str, content: bytes) -> bool:
        """Write a file that is not there yet; return whether it is ours then."""
        if self._write(path, content, mode="create"):
            return True
        # A repeated request may have found the file of the first attempt.
        return self._read(path) == content

    def _replace(self, path: str, content: bytes, tag: str | None) -> bool:
        """Replace a file; return False if it is no longer the one with this tag."""
        is_s3 = self.repository.startswith(("s3://", "s3a://"))
        return self._write(path, content, **({"IfMatch": tag} if is_s3 and tag else {}))

    def _write(self, path: str, content: bytes, **options: str) -> bool:
        """Write a file; return False if the options' condition does not hold."""
        try:
            self._send(path, lambda files, at: files.pipe_file(at, content, **options))
        except FileExistsError:
            return False
        return True

    def _put(self, path: str, file: Path) -> None:
        self._send(path, lambda files, at: files.put_file(str(file), at))

    def _send(self, path: str, request: Callable[[Any, str], object]) -> None:
        try:
            self._ask(path, PublishError, request)
        except FileNotFoundError as error:  # the bucket
            raise PublishError(f"{self._shown}: {one_line(error)}") from error

    def _read(self, path: str) -> bytes | None:
        try:
            content: bytes = self._ask(path, InputError, lambda files, at: files.cat_file(at))
        except FileNotFoundError:
            return None
        return content

    def _tag(self, path: str) -> str | None:
        try:
            info = self._ask(path, InputError, lambda files, at: files.info(at))
        except FileNotFoundError:
            return None
        tag: str | None = info.get("ETag")
        return tag

    def _paths(self) -> set[str]:
        """Return the paths of the model's files, relative to its folder."""
        try:
            return set(self._ask("", InputError, _paths_below))
        except FileNotFoundError as error:
            raise InputError(f"{self._shown}: {one_line(error)}") from error

    def _remove_files(self, version: int) -> None:
        """Remove the files of a version that was not published, except its claim.

        Raises:
            ExportError: The store cannot be read or written.
        """
        for path in self._paths():
            if path.startswith(f"{version}/") and path != f"{version}/{_CLAIM_NAME}":
                self._ask(path, PublishError, lambda files, at: files.rm_file(at))

    def _check_writable(self) -> None:
        if self.repository.startswith(_READ_ONLY):
            raise InputError(
                f"{self._shown}: expected a folder or an object store, got a web server, which "
                "takes no versions"
            )

    def _ask(
        self, path: str, kind: type[ExportError], request: Callable[[Any, str], Result]
    ) -> Result:
        return _asked(f"{self.repository}/{self.name}/{path}", kind, request)


def copy_version(url: str) -> Path:
    """Copy a version to a folder NAME/VERSION of this machine, which is removed at the exit.

    Raises:
        InputError: There is no such version, or it cannot be read.
    """
    url = url.rstrip("/")
    shown = without_secrets(url)
    name, version = url.split("/")[-2:]
    root = Path(tempfile.mkdtemp(prefix="convoy-export-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / name / version
    folder.mkdir(parents=True)

    def copy(files: Any, at: str) -> None:
        for path in _paths_below(files, at):
            if "/" not in path:
                files.get_file(f"{at}/{path}", str(folder / path))

    with contextlib.suppress(FileNotFoundError):
        _asked(url, InputError, copy)
    if not (folder / MANIFEST_NAME).exists():
        raise InputError(f"version {shown}: no such version")
    return folder


def _asked(url: str, kind: type[ExportError], request: Callable[[Any, str], Result]) -> Result:
    """Return what a request to the store of a URL returns.

    Raises:
        FileNotFoundError: There is no such file, or no such bucket.
        FileExistsError: The condition of a write does not hold.
        ExportError: It failed otherwise; an error of this kind, or an InputError for a URL that
            cannot be used.
    """
    try:
        from fsspec.core import url_to_fs

        files, at = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name or "fsspec"
        raise InputError(
            f"repository {without_secrets(url)}: needs the package {package}: "
            "pip install 'convoy-serving[cloud]'"
        ) from error
    except ValueError as error:
        raise InputError(f"repository {without_secrets(url)}: {one_line(error)}") from error
    try:
        return request(files, at.rstrip("/"))
    except (FileExistsError, FileNotFoundError):
        raise
    # Each of fsspec's file systems raises errors of its own library.
    except Exception as error:
        response = getattr(error.__cause__, "response", None) or {}
        if response.get("Error", {}).get("Code") in _LOST:
            raise FileExistsError(url) from error
        secret = secret_of(url)
        reason = one_line(error).replace(secret, "") if secret else one_line(error)
        raise kind(f"{without_secrets(url)}: {reason}") from error


def _paths_below(files: Any, folder: str) -> list[str]:
    start = f"{folder}/"
    return [path.removeprefix(start) for path in files.find(folder) if path.startswith(start)]


def _numbers(paths: set[str]) -> set[int]:
    """Return the numbers of the versions that have any file."""
    names = {path.partition("/")[0] for path in paths if "/" in path}
    return {int(name) for name in names if is_version_number(name)}


def without_secrets(url: str) -> str:
    """Return a URL without user, password and query, for messages."""
    parts = urlsplit(url)
    host = parts.netloc.removeprefix(secret_of(url))
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def secret_of(url: str) -> str:
    """Return "USER:PASSWORD@" of a URL; what else stands before an @ is a container of Azure."""
    before, at, _ = urlsplit(url).netloc.rpartition("@")
    return before + at if ":" in before else ""
