"""OUT.parts, the folder of an unfinished job.

    job.json        the job; a command for another job is rejected
    inputs          the lists of inputs, see `files` and `archives`
    journal         one line per part: its file and the counts of its rows
    part-0000.csv   the parts, in the order of the inputs
    lock            held while a process works here

A part is written under a temporary name, synced and renamed; then its line is added to the journal.
A part counts once its line is complete. So if the process is killed at any moment, the parts in the
journal hold the first inputs, each once, and the job resumes with the next.

The parts of a table in an object store are in the store too, see `store`.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convoy.client.batch.counts import Counts
from convoy.client.batch.errors import OutputError
from convoy.client.batch.items import Row
from convoy.client.batch.store import TableStore
from convoy.client.batch.tables import Table

State = Mapping[str, object]


class PartFolder:
    """The parts of one table, made by `open_parts`.

    Attributes:
        path: The folder.
        counts: Of the rows in the parts.
    """

    def __init__(self, path: Path, out: Path, table: Table, store: TableStore | None) -> None:
        self.path = path
        self.counts = Counts()
        self._out = out
        self._table = table
        self._store = store
        self._parts: list[Path] = []
        self._journal = path / "journal"

    def recover(self) -> None:
        """Read the journal; remove files that it does not list.

        Raises:
            OutputError: A part is missing.
        """
        lines = self._journal.read_bytes() if self._journal.exists() else b""
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole != lines:
            os.truncate(self._journal, len(whole))
        for line in whole.splitlines():
            record = json.loads(line)
            self._parts.append(self.path / record["part"])
            self.counts.merge(Counts.from_json(record))
        found = set(self.path.glob("part-*" + self._out.suffix))
        if missing := set(self._parts) - found:
            raise OutputError(f"{min(missing)}: is missing; delete {self.path} to start again")
        for path in found.difference(self._parts).union(self.path.glob("*.tmp")):
            path.unlink()

    def append(self, rows: Sequence[Row], counts: Counts) -> None:
        """Write a part.

        Args:
            rows: Of the inputs after those in the parts so far.
            counts: Their counts.

        Raises:
            OutputError: The disk is full or fails.
        """
        number = len(self._parts)
        token = f"-{self._store.token}" if self._store else ""
        part = self.path / f"part-{number:08}{token}{self._out.suffix}"
        record = {"part": part.name, "first": self.counts.images, **counts.to_json()}
        line = (json.dumps(record) + "\n").encode()
        with self.explaining_failures():
            with replacing(part) as temporary:
                self._table.write(rows, temporary)
            if self._store:
                self._store.append(number, line)
            _append_line(self._journal, line)
        self._parts.append(part)
        self.counts.merge(counts)

    def merge(self) -> None:
        """Write the table from the parts.

        Raises:
            OutputError: The disk is full or fails.
        """
        with self.explaining_failures(), replacing(self._out) as temporary:
            self._table.merge(self._parts, temporary)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the parts."""
        for part in self._parts:
            yield from self._table.read_part(part)

    def finish(self) -> None:
        """Store the table and its files, if it belongs to an object store; then discard the parts.

        Raises:
            OutputError: The store fails, or another process writes there.
        """
        if self._store:
            with self.explaining_failures():
                self._store.publish()
        self.discard()

    def discard(self) -> None:
        """Remove the folder; a partly removed one is never resumed.

        Raises:
            OutputError: The disk or the store fails.
        """
        if self._store:
            with self.explaining_failures():
                self._store.discard()
        os.rename(self.path, _done(self._out))
        remove_leftovers(self._out)

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Turn a failure of the disk inside the block into an error that says how to resume.

        Raises:
            OutputError: The disk is full or fails.
        """
        try:
            yield
        except OSError as error:
            kept = f"{self.counts.images} images are kept; the same command resumes after them"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OutputError(f"--out: {self._out}: {reason}; {kept}") from error


def remove_leftovers(out: Path) -> None:
    """Remove the remaining parts of a finished table."""
    if _done(out).exists():
        shutil.rmtree(_done(out))


@contextlib.contextmanager
def open_parts(
    out: Path, table: Table, state: State, *, overwrite: bool, store: TableStore | None = None
) -> Iterator[PartFolder]:
    """Make or open the folder of a job; lock it against other processes.

    If the block fails before there is a part, the folder is removed.

    Args:
        out: The table.
        table: Its format.
        state: What the job is.
        overwrite: Whether to discard the unfinished parts of another job.
        store: Where the table belongs, if not on this machine.

    Raises:
        OutputError: The folder cannot be made, is in use, or belongs to another job.
    """
    path = parts_path(out)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out: {path}: {error.strerror}") from error
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OutputError(f"--out: {path}: {error.strerror}") from error
            raise OutputError(f"--out: another process writes {out}") from None
        parts = PartFolder(path, out, table, store)
        with parts.explaining_failures():
            new = _claim(path, state, overwrite)
            parts.recover()
            if store:
                store.claim(new=new)
        try:
            yield parts
        except Exception:
            # Without a part there is nothing to resume, and the folder would block another job.
            if not parts.counts.images:
                parts.discard()
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name that becomes `path`, synced, when the block succeeds."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _difference(expected: State, found: State) -> str:
    """Return the first field in which two jobs differ; empty if they are the same."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name}: {found.get(name)!r} there, {expected.get(name)!r} here"
    return ""


def _claim(path: Path, state: State, overwrite: bool) -> bool:
    """Check the job.json that is there, or write one; return whether it was written."""
    job = path / "job.json"
    if job.exists():
        other = _difference(state, json.loads(job.read_text(encoding="utf-8")))
        if not other:
            return False
        if not overwrite:
            raise OutputError(
                f"--out: {path}: holds an unfinished job that differs ({other}); "
                "finish or delete it, or use --overwrite"
            )
    for leftover in path.iterdir():
        if leftover.name != "lock":
            leftover.unlink()
    with replacing(job) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")
    return True


def _append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, completely or, if the disk is full, not at all."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parts_path(out: Path) -> Path:
    """Return the folder of the parts of a table."""
    return out.with_name(out.name + ".parts")


def _done(out: Path) -> Path:
    return out.with_name(out.name + ".parts.done")
