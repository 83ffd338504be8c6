"""OUT.parts, the folder of a job that is under way: nothing in it is done twice.

    job.json        what the job is; a command that means another one is refused
    inputs          the frozen list of files, see `listing`
    journal         one line a part: how many inputs it holds and what was counted in them
    part-0000.csv   the parts, in the order of the inputs
    lock            held while a process works here

A part is written under a temporary name, synced and renamed; then its line is added to the journal.
A part counts when its line is whole. So whenever the process is killed, the journal's parts hold
the first inputs, each once, and the job goes on with the next.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clients.batch.errors import OutputError
from clients.batch.rows import Row
from clients.batch.tables import Table
from clients.batch.tally import Tally

State = Mapping[str, object]


class PartFolder:
    """The parts of one table. Made by `open_parts`.

    Attributes:
        path: The folder.
        tally: What is in the parts that count.
    """

    def __init__(self, path: Path, out: Path, table: Table) -> None:
        self.path = path
        self.tally = Tally()
        self._out = out
        self._table = table
        self._parts: list[Path] = []
        self._journal = path / "journal"

    def recover(self) -> None:
        """Reads the journal and removes what it does not count.

        Raises:
            OutputError: A part is gone.
        """
        lines = self._journal.read_bytes() if self._journal.exists() else b""
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole != lines:
            os.truncate(self._journal, len(whole))
        for line in whole.splitlines():
            record = json.loads(line)
            self._parts.append(self.path / record["part"])
            self.tally.merge(Tally.from_json(record))
        found = set(self.path.glob("part-*" + self._out.suffix))
        if missing := set(self._parts) - found:
            raise OutputError(f"{min(missing)}: is gone; delete {self.path} to begin anew")
        for path in found.difference(self._parts).union(self.path.glob("*.tmp")):
            path.unlink()

    def append(self, rows: Sequence[Row], tally: Tally) -> None:
        """Writes a part.

        Args:
            rows: Of the inputs that follow those in the parts so far.
            tally: Their counts.

        Raises:
            OutputError: The disk is full, or fails.
        """
        part = self.path / f"part-{len(self._parts):08}{self._out.suffix}"
        with self.explaining_failures():
            with replacing(part) as temporary:
                self._table.write(rows, temporary)
            line = json.dumps({"part": part.name, **tally.to_json()}) + "\n"
            _append_line(self._journal, line.encode())
        self._parts.append(part)
        self.tally.merge(tally)

    def merge(self) -> None:
        """Writes the table from the parts.

        Raises:
            OutputError: The disk is full, or fails.
        """
        with self.explaining_failures(), replacing(self._out) as temporary:
            self._table.merge(self._parts, temporary)

    def remove(self) -> None:
        """Removes the folder; a half removed one is never taken for one to go on with."""
        os.rename(self.path, _done(self._out))
        remove_leftovers(self._out)

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Makes what the disk fails with inside the block an error that says how to go on.

        Raises:
            OutputError: The disk is full, or fails.
        """
        try:
            yield
        except OSError as error:
            kept = f"{self.tally.images} images are kept; the same command goes on after them"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OutputError(f"--out: {self._out}: {reason}; {kept}") from error


def remove_leftovers(out: Path) -> None:
    """Removes what is left of the parts of a finished table."""
    if _done(out).exists():
        shutil.rmtree(_done(out))


@contextlib.contextmanager
def open_parts(out: Path, table: Table, state: State, *, overwrite: bool) -> Iterator[PartFolder]:
    """Makes the folder of a job or goes on with it; no other process may work there meanwhile.

    Where the block fails before there is a part, the folder is removed.

    Args:
        out: The table.
        table: Its format.
        state: What the job is.
        overwrite: Whether the unfinished parts of another job may be thrown away.

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
        parts = PartFolder(path, out, table)
        with parts.explaining_failures():
            _claim(path, state, overwrite)
            parts.recover()
        try:
            yield parts
        except Exception:
            # With no part there is nothing to go on with, and a next job is not told of this one.
            if not parts.tally.images:
                parts.remove()
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name that becomes `path`, on the disk, when the block ends well."""
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
    """Names the first field in which two jobs differ; empty if they are the same."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name}: {found.get(name)!r} there, {expected.get(name)!r} here"
    return ""


def _claim(path: Path, state: State, overwrite: bool) -> None:
    """Leaves the folder with a job.json that says `state`."""
    job = path / "job.json"
    if job.exists():
        other = _difference(state, json.loads(job.read_text(encoding="utf-8")))
        if not other:
            return
        if not overwrite:
            raise OutputError(
                f"--out: {path}: an unfinished job of another kind ({other}); finish or delete it, "
                "or give --overwrite"
            )
    for leftover in path.iterdir():
        if leftover.name != "lock":
            leftover.unlink()
    with replacing(job) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")


def _append_line(path: Path, line: bytes) -> None:
    """Adds a line to a file, whole or, where the disk is full, not at all."""
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
    """Where the parts of a table lie."""
    return out.with_name(out.name + ".parts")


def _done(out: Path) -> Path:
    return out.with_name(out.name + ".parts.done")
