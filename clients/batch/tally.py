"""What a job counted: images, errors, classes, and where folders are class names, hits."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from clients.batch.rows import Row


@dataclass(slots=True)
class Tally:
    """Counts of rows; grows with the classes, not with the images.

    Attributes:
        classes: Images by their most probable label.
        confusion: Images by the folder they lie in and their most probable label; empty unless the
            job evaluates.
    """

    images: int = 0
    errors: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, rows: Iterable[Row], *, evaluate: bool) -> None:
        """Counts rows."""
        for row in rows:
            self.images += 1
            if row.error is not None:
                self.errors += 1
                continue
            label = row.labels[0]
            self.classes[label] += 1
            if evaluate:
                self.confusion[PurePosixPath(row.key).parent.name, label] += 1

    def merge(self, other: "Tally") -> None:
        """Adds another's counts."""
        self.images += other.images
        self.errors += other.errors
        self.classes += other.classes
        self.confusion += other.confusion

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return {
            "images": self.images,
            "errors": self.errors,
            "classes": dict(self.classes),
            "confusion": [[*pair, count] for pair, count in self.confusion.items()],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Tally":
        """The opposite of `to_json`."""
        confusion = {(truth, label): count for truth, label, count in record["confusion"]}
        return cls(
            record["images"], record["errors"], Counter(record["classes"]), Counter(confusion)
        )
