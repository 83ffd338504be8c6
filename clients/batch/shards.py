"""One job as several, for schedulers that start the same command many times."""

import re
from dataclasses import dataclass
from pathlib import Path

from clients.batch.errors import InputError

_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`; the inputs of all parts are disjoint and complete."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads "i/n", counted from 0.

        Raises:
            InputError: It is not of that form, or i is not below n.
        """
        match = _SHARD.fullmatch(text)
        if not match or int(match[1]) >= int(match[2]):
            raise InputError(f"--shard: expected I/N with I from 0 to N-1, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def of(self, total: int) -> range:
        """The shard's numbers where inputs are numbered from 0 to `total`."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def name(self, out: Path) -> Path:
        """The shard's own table: out-00001-of-00004.csv."""
        if self.count == 1:
            return out
        return out.with_name(f"{out.stem}-{self.index:05}-of-{self.count:05}{out.suffix}")
