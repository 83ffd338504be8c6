"""A table in an object store: the job works on copies in a folder of this machine.

A store has no locks, renames or appends; its files appear and are replaced as wholes. OUT.parts
in a store contains

    inputs…, job.json            as on a disk; without job.json the rest is ignored
    part-00000000-TOKEN.csv      a part, as the process with this token wrote it
    record-00000000              its line of the journal; with it the part is complete
    owner                        the token of the process that started last

A process ends when it finds the token of another in `owner`. So if two processes write one table,
the later one resumes after the parts of the first, and the first ends.
"""

import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from convoy.client import urls
from convoy.client.batch.errors import OutputError
from convoy.client.urls import UrlFolder

_OWNER = "owner"
_JOB = "job.json"
_JOURNAL = "journal"
_RECORD = "record-"
_PART = "part-"
# What stays on this machine.
_LOCAL = (_JOURNAL, "lock")


class TableStore:
    """A table and its parts in an object store.

    Args:
        url: The folder of the table.
        table: The table's copy on this machine; the job's other files lie beside it.
        parts: The copy of OUT.parts.

    Attributes:
        token: Distinguishes this process from others that write the same table.
    """

    def __init__(self, url: str, table: Path, parts: Path) -> None:
        self._folder = UrlFolder(url)
        self._parts_folder = UrlFolder(f"{url}/{parts.name}")
        self._table = table
        self._parts = parts
        self._stored: set[str] = set()
        self._counted: set[str] = set()
        self.token = uuid.uuid4().hex[:8]

    def fetch(self, beside: Sequence[Path]) -> None:
        """Copy the parts of an earlier job, and those of these files that exist.

        Raises:
            OSError: The store cannot be read.
        """
        self._stored = set(self._parts_folder.names())
        if _JOB in self._stored:
            self._fetch_parts()
        fetch_existing(self._folder, beside)

    def remove_leftovers(self) -> None:
        """Remove what is left of the parts of a finished table.

        Raises:
            OSError: The store cannot be written.
        """
        if _JOB not in self._stored:
            self._remove(self._stored)

    def claim(self, *, new: bool) -> None:
        """Become the owner of the parts; remove incomplete ones.

        Args:
            new: Whether the fetched parts belong to another job.

        Raises:
            OSError: The store cannot be written.
        """
        self._parts_folder.put(_OWNER, self.token.encode())
        unwanted = self._stored - {_OWNER} - (set() if new else self._counted)
        self._remove(unwanted)

    def append(self, number: int, line: bytes) -> None:
        """Store the new parts, then the journal's line of part `number`.

        Raises:
            OSError: The store cannot be written.
            OutputError: Another process has started to write this table.
        """
        self._check_owner()
        new = [path for path in self._parts.iterdir() if path.name not in (*_LOCAL, *self._stored)]
        self._parts_folder.write(sorted(new, key=lambda path: (path.name == _JOB, path.name)))
        self._stored |= {path.name for path in new}
        self._check_owner()  # the files may have taken minutes
        record = f"{_RECORD}{number:08}"
        self._parts_folder.put(record, line)
        self._stored.add(record)

    def publish(self) -> None:
        """Store the files of the table, and last the table itself.

        Raises:
            OSError: The store cannot be written.
            OutputError: Another process has started to write this table.
        """
        self._check_owner()
        beside = [path for path in self._table.parent.iterdir() if path.is_file()]
        self._folder.write(sorted(beside, key=lambda path: (path == self._table, path.name)))

    def discard(self) -> None:
        """Remove the parts, unless they belong to another process by now.

        Raises:
            OSError: The store cannot be written.
        """
        if self._owns():
            self._remove(set(self._parts_folder.names()))

    def _fetch_parts(self) -> None:
        self._parts.mkdir()
        lines = list(self._records())
        records = {f"{_RECORD}{number:08}" for number in range(len(lines))}
        others = {name for name in self._stored if not name.startswith((_PART, _RECORD, _OWNER))}
        copied = others | {json.loads(line)["part"] for line in lines}
        self._parts_folder.read(sorted(copied), self._parts)
        (self._parts / _JOURNAL).write_bytes(b"".join(lines))
        self._counted = copied | records

    def _records(self) -> Iterator[bytes]:
        """Yield the journal's lines, as far as each continues the one before.

        A process that lost its ownership while it wrote one may have replaced another's.
        """
        images = 0
        for number in itertools.count():
            name = f"{_RECORD}{number:08}"
            if name not in self._stored:
                return
            line = self._parts_folder.content(name)
            record = json.loads(line)
            if record["first"] != images:
                return
            images += record["images"]
            yield line

    def _remove(self, names: set[str]) -> None:
        """Remove files, job.json first: the others never count without it."""
        self._parts_folder.remove(sorted(names, key=lambda name: (name != _JOB, name)))
        self._stored = self._stored - names

    def _owns(self) -> bool:
        try:
            return self._parts_folder.content(_OWNER) == self.token.encode()
        except FileNotFoundError:  # another process has finished the job
            return False

    def _check_owner(self) -> None:
        if not self._owns():
            raise OutputError(f"--out: another process writes {self._table}")


def fetch_existing(folder: UrlFolder, paths: Sequence[Path]) -> None:
    """Copy the files of these names, where the folder has them.

    Raises:
        OSError: The store cannot be read.
    """
    for path in paths:
        if urls.exists(f"{folder.url}/{path.name}"):
            folder.read([path.name], path.parent)
