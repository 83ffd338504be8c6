"""The model repository on a disk: version folders that appear atomically, and the served version.

An exporter builds a version in a hidden folder, NAME/.VERSION.RANDOM.partial, which no server
loads, and renames it when every byte is on disk. It never changes a version afterwards. Exporters
lock the NAME folder only for the numbering and the rename. The lock on a hidden folder shows that
its exporter is alive; the next exporter removes folders of killed ones. promote and rollback
replace NAME/policy.json atomically. `object_store` does the same in an object store.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from google.protobuf import json_format

from convoy.export.errors import InputError, PublishError, one_line
from convoy.v1 import model_manifest_pb2 as pb

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_READ_ONLY = 0o444
_FOLDER_MODE = 0o755
MANIFEST_NAME = "manifest.json"
POLICY_NAME = "policy.json"
POLICY_SCHEMA_VERSION = 1

Seal = Callable[[Path, int], None]
"""Completes a staged folder for a version number by writing the manifest."""
PolicyChange = Callable[[pb.ServingPolicy | None], pb.ServingPolicy]
"""Returns the policy that follows another; it may be called again if somebody else was faster."""


class Model(Protocol):
    """The versions of one model in a repository."""

    @property
    def name(self) -> str:
        """The name it is served under."""

    def versions(self) -> list[int]:
        """Return the existing version numbers in ascending order."""

    def location(self, version: int) -> Path | str:
        """Return the folder or the URL of a version."""

    def stage(self) -> AbstractContextManager[Path]:
        """Yield a folder of this machine to build a version in; it is deleted afterwards."""

    def publish(self, staged: Path, seal: Seal) -> int:
        """Publish a staged folder, which `seal` completes, as the next version; return its number.

        Raises:
            PublishError: Nothing was published.
        """

    def read_policy(self) -> pb.ServingPolicy | None:
        """Return the policy, or None if the newest version is served.

        Raises:
            InputError: It is malformed, or cannot be read.
        """

    def change_policy(self, change: PolicyChange) -> pb.ServingPolicy:
        """Replace the policy, and return the new one.

        Raises:
            PublishError: It cannot be written.
        """


def model_in(repository: str | Path, name: str) -> Model:
    """Return a model in a repository: a folder, or the URL of one in an object store.

    Raises:
        InputError: The name is not allowed.
    """
    if "://" not in str(repository):
        return ModelFolder(Path(repository), name)
    from convoy.export.object_store import StoredModel

    return StoredModel(str(repository).rstrip("/"), name)


def check_name(name: str) -> None:
    """Check the name of a model.

    Raises:
        InputError: It is not allowed.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            "name: expected 1 to 64 letters, digits, '_', '-' or '.', the first a letter or "
            f"digit, got {name!r}"
        )


def is_version_number(name: str) -> bool:
    """Tell whether a name in a model's folder is that of a version."""
    return _VERSION.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The versions of one model in a repository.

    Raises:
        InputError: The name is not allowed.
    """

    repository: Path
    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def path(self) -> Path:
        """REPOSITORY/NAME."""
        return self.repository / self.name

    def versions(self) -> list[int]:
        """Return the existing version numbers in ascending order."""
        if not self.path.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in self.path.iterdir() if is_version_number(entry.name)
        )

    def location(self, version: int) -> Path:
        """Return the folder of a version."""
        return self.path / str(version)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Yield a folder to build a version in; it is deleted afterwards unless it was published.

        Raises:
            PublishError: The repository cannot be written to.
        """
        is_new = not self.repository.exists()
        with failures_reported(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with self.locked():
                self._sweep()
                staged = Path(
                    tempfile.mkdtemp(
                        prefix=f".{self._next_version()}.", suffix=".partial", dir=self.path
                    )
                )
                owner = _lock(staged)
        try:
            with failures_reported(self.path):
                yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            os.close(owner)
            # Succeeds only if this was the first export of the name and it failed.
            with suppress(OSError):
                self.path.rmdir()
                if is_new:
                    self.repository.rmdir()

    def publish(self, staged: Path, seal: Seal) -> int:
        """Turn a staged folder into the next version and return its number.

        Args:
            staged: From `stage`, with every file except those that `seal` writes.
            seal: Called with the folder and the number when both are final.

        Raises:
            PublishError: The folder could not be completed or moved; nothing was published.
        """
        with self.locked(), failures_reported(self.path):
            version = self._next_version()
            seal(staged, version)
            for file in staged.iterdir():
                file.chmod(_READ_ONLY)
                _sync(file)
            staged.chmod(_FOLDER_MODE)
            _sync(staged)
            staged.rename(self.path / str(version))
            for folder in (self.path, self.repository):
                _sync(folder)
        return version

    def read_policy(self) -> pb.ServingPolicy | None:
        """Return the policy, or None if the newest version is served.

        Raises:
            InputError: It is malformed, or cannot be read.
        """
        try:
            content = (self.path / POLICY_NAME).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"model {self.name!r}: {POLICY_NAME}: {one_line(error)}") from error
        return parse_policy(self.name, content)

    def change_policy(self, change: PolicyChange) -> pb.ServingPolicy:
        """Replace the policy, and return the new one.

        Raises:
            PublishError: It cannot be written.
        """
        if not self.path.is_dir():
            raise InputError(f"model {self.name!r}: no such model in {self.repository}")
        with self.locked():
            policy = change(self.read_policy())
            self._write_policy(policy)
        return policy

    def _write_policy(self, policy: pb.ServingPolicy) -> None:
        try:
            with tempfile.NamedTemporaryFile(
                "wb", dir=self.path, prefix=f".{POLICY_NAME}.", delete=False
            ) as file:
                file.write(policy_json(policy))
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(self.path / POLICY_NAME)
        except OSError as error:
            raise PublishError(f"model {self.name!r}: {POLICY_NAME}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other exporters from numbering, publishing or promoting meanwhile.

        Raises:
            PublishError: The folder of the model is missing or cannot be locked.
        """
        with failures_reported(self.path):
            descriptor = _lock(self.path, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(descriptor)

    def _next_version(self) -> int:
        return max(self.versions(), default=0) + 1

    def _sweep(self) -> None:
        """Remove the staged folders of exporters that no longer run."""
        for folder in self.path.glob(".*.partial"):
            with suppress(BlockingIOError):
                os.close(_lock(folder))
                shutil.rmtree(folder)


def _lock(folder: Path, flags: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, flags)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failures_reported(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a PublishError that names a folder."""
    try:
        yield
    except OSError as error:
        raise PublishError(f"repository {folder}: {error.strerror or error}") from error


def parse_policy(model: str, content: bytes) -> pb.ServingPolicy:
    """Parse the policy of a model.

    Raises:
        InputError: It is malformed.
    """
    try:
        return json_format.Parse(content.decode(), pb.ServingPolicy())
    except (UnicodeDecodeError, json_format.ParseError) as error:
        raise InputError(f"model {model!r}: {POLICY_NAME}: {one_line(error)}") from error


def policy_json(policy: pb.ServingPolicy) -> bytes:
    """Return a policy as it is written."""
    text = json_format.MessageToJson(policy, preserving_proto_field_name=True)
    return f"{text}\n".encode()


def read_canary_record(version: Path, root: Path) -> pb.CanaryRecord | None:
    """Return what a server recorded about its canary of a version, or None where nothing is.

    Args:
        version: The folder NAME/VERSION.
        root: The repository, or the --state-dir of a server.

    Raises:
        InputError: The file is malformed.
    """
    path = root / version.parent.name / f"{version.name}.canary.json"
    try:
        return json_format.Parse(path.read_text(encoding="utf-8"), pb.CanaryRecord())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InputError(f"version {version}: {path.name}: {one_line(error)}") from error


def promote(model: Model, version: int) -> pb.ServingPolicy:
    """Make servers serve a version, even if newer ones are published.

    Raises:
        InputError: There is no such version.
        PublishError: The policy cannot be written.
    """
    known = model.versions()
    if version not in known:
        found = ", ".join(map(str, known)) or "none"
        raise InputError(
            f"model {model.name!r}: expected one of its versions ({found}), got {version}"
        )

    def follow(before: pb.ServingPolicy | None) -> pb.ServingPolicy:
        return _policy(version, [*before.previous, before.version] if before else [])

    return model.change_policy(follow)


def rollback(model: Model) -> pb.ServingPolicy:
    """Undo the last promotion.

    Raises:
        InputError: Nothing was promoted before the current version.
        PublishError: The policy cannot be written.
    """

    def undo(before: pb.ServingPolicy | None) -> pb.ServingPolicy:
        if before is None or not before.previous:
            raise InputError(f"model {model.name!r}: expected an earlier promotion, found none")
        return _policy(before.previous[-1], before.previous[:-1])

    return model.change_policy(undo)


def _policy(version: int, previous: Sequence[int]) -> pb.ServingPolicy:
    return pb.ServingPolicy(
        schema_version=POLICY_SCHEMA_VERSION, version=version, previous=previous
    )
