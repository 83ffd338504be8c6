"""What a job did, for people and, beside the table, as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from clients.batch.evaluation import Evaluation
from clients.batch.parts import State, replacing
from clients.batch.tally import Tally


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What is in a finished table, and what the last run did for it.

    Attributes:
        counts: Of all rows of the table.
        earlier: Images that earlier runs had done.
        duration_s: Of the last run, which did the rest.
        evaluation: Where one was asked for and folders are classes.
    """

    counts: Tally
    earlier: int
    duration_s: float
    evaluation: Evaluation | None

    @property
    def images_per_s(self) -> float:
        """Throughput of the last run, its start and end included."""
        return (self.counts.images - self.earlier) / self.duration_s if self.duration_s else 0.0

    @property
    def classes(self) -> dict[str, int]:
        """Images by most probable label, the most frequent first."""
        return dict(self.counts.classes.most_common())


def summary_path(table: Path) -> Path:
    """Where the summary of a table lies."""
    return table.with_name(table.name + ".summary.json")


def write_summary(summary: BatchSummary, state: State, table: Path) -> None:
    """Writes the summary, with what the job was."""
    record = {"job": dict(state), **summary.counts.to_json(), "images_per_s": summary.images_per_s}
    if evaluation := summary.evaluation:
        record |= {
            "accuracy": evaluation.accuracy,
            "accuracy_per_class": dict(evaluation.per_class),
            "evaluated_images": evaluation.images,
        }
    with replacing(summary_path(table)) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")


def read_counts(state: State, table: Path) -> Tally | None:
    """Reads what a finished table holds; None where there is none, or of another job."""
    try:
        record = json.loads(summary_path(table).read_text(encoding="utf-8"))
        return Tally.from_json(record) if record["job"] == state else None
    except (OSError, ValueError, KeyError):
        return None
