"""The counts of a job's rows: images, errors and their reasons, classes, versions, hits."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from convoy.client.batch.items import Row

MAX_REASONS = 50
MAX_FAILED_KEYS = 20
OTHER_REASONS = "other reasons"
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBER = re.compile(r"\d+")


@dataclass(slots=True)
class Counts:
    """Counts of rows; their size grows with the classes, not with the images.

    Attributes:
        reasons: Errors by their text, without the details that differ between images.
        failed: The keys of the first rows with an error.
        classes: Images by their most probable label.
        versions: Images by the model version that answered, as "NAME/VERSION".
        confusion: Images by their true label and their most probable one, None for an error; empty
            unless the job evaluates.
    """

    images: int = 0
    errors: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    confusion: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    @property
    def version(self) -> int:
        """The version that answered; 0 if none did, or several."""
        numbers = [int(name.rpartition("/")[2]) for name in self.versions]
        return numbers[0] if len(numbers) == 1 else 0

    def add(self, rows: Iterable[Row]) -> None:
        """Count rows."""
        for row in rows:
            self.images += 1
            label = None
            if row.error is None:
                label = row.labels[0]
                self.classes[label] += 1
                self.versions[f"{row.model}/{row.version}"] += 1
            else:
                self._add_error(row.key, row.error)
            if row.true_label is not None:
                self.confusion[row.true_label, label] += 1

    def _add_error(self, key: str, error: str) -> None:
        self.errors += 1
        reason = reason_of(key, error)
        known = reason in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[reason if known else OTHER_REASONS] += 1
        if len(self.failed) < MAX_FAILED_KEYS:
            self.failed.append(key)

    def merge(self, other: "Counts") -> None:
        """Add other counts."""
        self.images += other.images
        self.errors += other.errors
        self.reasons += other.reasons
        self.failed = (self.failed + other.failed)[:MAX_FAILED_KEYS]
        self.classes += other.classes
        self.versions += other.versions
        self.confusion += other.confusion

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON's types."""
        return {
            "images": self.images,
            "errors": self.errors,
            "errors_by_reason": dict(self.reasons.most_common()),
            "first_failed": self.failed,
            "classes": dict(self.classes.most_common()),
            "versions": dict(self.versions),
            "confusion": [[*pair, count] for pair, count in self.confusion.items()],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Counts":
        """Return the counts that `to_json` wrote."""
        confusion = {(truth, label): count for truth, label, count in record["confusion"]}
        return cls(
            record["images"],
            record["errors"],
            Counter(record["errors_by_reason"]),
            list(record["first_failed"]),
            Counter(record["classes"]),
            Counter(record["versions"]),
            Counter(confusion),
        )


def reason_of(key: str, error: str) -> str:
    """Return an error without the details that differ between images: paths, names and numbers."""
    text = error.replace(key, "PATH") if key and key in error else error
    head, separator, tail = text.partition(": ")
    if separator and ("/" in head or head.endswith("PATH")):
        text = tail
    return _NUMBER.sub("N", _QUOTED.sub("'…'", text))
