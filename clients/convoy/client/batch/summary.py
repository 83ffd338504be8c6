"""The summary of a job: for people, and as JSON beside the table."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convoy.client.batch.counts import Counts
from convoy.client.batch.errors import BatchError
from convoy.client.batch.evaluation import Evaluation
from convoy.client.batch.parts import State, replacing


@dataclass(frozen=True, slots=True)
class InputCounts:
    """Inputs of a job that are not in its table.

    Attributes:
        left_out: Entries of the input that are not images, by reason.
        failures: Whole inputs that could not be read, with the reason.
    """

    left_out: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ErrorLimit:
    """The errors that a job may have and still succeed.

    Attributes:
        number: Their number, or
        share: their share of the rows, 0 to 1.
    """

    number: int | None = None
    share: float = 0.1

    @classmethod
    def parse(cls, text: str) -> "ErrorLimit":
        """Read a number ("100"), or a share ("0.1" or "10%").

        Raises:
            BatchError: It is neither.
        """
        if re.fullmatch(r"\d{1,12}", text):
            return cls(number=int(text))
        if match := re.fullmatch(r"(\d{1,3}(?:\.\d+)?)%|([01]\.\d+)", text):
            share = float(match[1]) / 100 if match[1] else float(match[2])
            if share <= 1:
                return cls(share=share)
        raise BatchError(f"--max-errors: expected a number, a share or a percentage, got {text!r}")

    def is_exceeded(self, counts: Counts) -> bool:
        """Tell whether a job has more errors than allowed."""
        if self.number is not None:
            return counts.errors > self.number
        return counts.errors > self.share * counts.images


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """The content of a finished table, and the work of the last run.

    Attributes:
        counts: Of all rows of the table.
        earlier: Images of earlier runs.
        duration_s: Of the last run.
        evaluation: If the job evaluates.
        inputs: The inputs that are not in the table.
    """

    counts: Counts
    earlier: int
    duration_s: float
    evaluation: Evaluation | None
    inputs: InputCounts = field(default_factory=InputCounts)

    @property
    def images_per_s(self) -> float:
        """Throughput of the last run, its start and end included."""
        return (self.counts.images - self.earlier) / self.duration_s if self.duration_s else 0.0

    @property
    def classes(self) -> dict[str, int]:
        """Images by most probable label, the most frequent first."""
        return dict(self.counts.classes.most_common())


def summary_path(table: Path) -> Path:
    """Return the path of a table's summary."""
    return table.with_name(table.name + ".summary.json")


def write_summary(summary: BatchSummary, state: State, table: Path) -> None:
    """Write the summary, with what the job was."""
    inputs = summary.inputs
    record = {
        "job": dict(state),
        **summary.counts.to_json(),
        "classified": summary.counts.images - summary.counts.errors,
        "left_out": dict(inputs.left_out),
        "failed_inputs": dict(inputs.failures),
        "images_per_s": summary.images_per_s,
    }
    if evaluation := summary.evaluation:
        record |= {
            "accuracy": evaluation.accuracy,
            "accuracy_of_classified": evaluation.accuracy_of_classified,
            "accuracy_per_class": dict(evaluation.per_class),
            "evaluated_images": evaluation.images,
            "evaluated_images_per_class": dict(evaluation.images_per_class),
            "not_evaluated_by_label": dict(evaluation.left_out),
        }
    with replacing(summary_path(table)) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")


def read_summary(table: Path) -> tuple[State, Counts, InputCounts] | None:
    """Read what a finished table holds; None where there is no summary, or of another release."""
    try:
        record = json.loads(summary_path(table).read_text(encoding="utf-8"))
        inputs = InputCounts(record["left_out"], record["failed_inputs"])
        return record["job"], Counts.from_json(record), inputs
    except (OSError, ValueError, KeyError, TypeError):
        return None
