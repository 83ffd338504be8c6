"""report.png: parity, accuracy by class and latency of a version's artifacts."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convoy.export.manifest import ProvedArtifact
from convoy.export.reference import Expectation
from convoy.export.source import ModelSource

_SHOWN_CLASSES = 20
_LEAST_DIFFERENCE = 1e-9
"""Drawn for a difference of 0, which a logarithmic axis cannot show."""


def write(
    path: Path,
    name: str,
    source: ModelSource,
    expected: Expectation,
    artifacts: Sequence[ProvedArtifact],
) -> Figure:
    """Draw the page, without the version's number, which is not yet known."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    parity, accuracy, latency = figure.subplots(1, 3)
    figure.suptitle(
        f"{name}: {source.architecture}, {source.parameters:,} parameters, "
        f"checkpoint {source.checkpoint_sha256[:12]}"
    )
    _draw_parity(parity, artifacts)
    _draw_class_accuracy(accuracy, source.data.classes, expected, artifacts)
    _draw_latency(latency, artifacts)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=10)
    figure.savefig(path, dpi=80)
    return figure


def _draw_parity(axes: Axes, artifacts: Sequence[ProvedArtifact]) -> None:
    rows = range(len(artifacts))
    parities = [artifact.parity for artifact in artifacts]
    found = {
        "99.9 % of all": [parity.logit_difference_p999 for parity in parities],
        "largest": [parity.max_logit_difference for parity in parities],
        "tolerance": [parity.tolerance for parity in parities],
    }
    for (label, differences), marker in zip(found.items(), (".", "o", "|"), strict=True):
        axes.plot(
            np.maximum(differences, _LEAST_DIFFERENCE),
            rows,
            marker,
            label=label,
            markersize=20 if marker == "|" else None,
        )
    labels = [
        f"{artifact.variant.title}\n{_size(artifact.path)}, "
        f"same class {parity.argmax_agreement:.1%}"
        for artifact, parity in zip(artifacts, parities, strict=True)
    ]
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xscale("log")
    axes.set_xlabel("difference of a logit from the eager net")
    axes.set_title(f"parity, {parities[0].samples} samples")
    axes.legend()


def _draw_class_accuracy(
    axes: Axes, classes: Sequence[str], expected: Expectation, artifacts: Sequence[ProvedArtifact]
) -> None:
    """Show every class, or of many the least accurate ones of the eager net."""
    reference = expected.correct(expected.outputs.logits)
    if not len(reference):
        axes.set_axis_off()
        axes.set_title("accuracy not measured: no labeled images")
        return
    eager = expected.class_accuracy(reference)
    known = [label for label, accuracy in enumerate(eager) if not math.isnan(accuracy)]
    worst = sorted(known, key=lambda label: eager[label])[:_SHOWN_CLASSES]
    shown = sorted(worst) if len(known) <= _SHOWN_CLASSES else worst
    columns = range(len(shown))
    axes.bar(columns, [eager[label] for label in shown], color="lightgrey", label="eager net")
    for artifact in artifacts:
        found = artifact.parity.class_accuracy
        axes.plot(
            columns,
            [found[label] for label in shown],
            "_",
            label=artifact.variant.title,
            markersize=14,
        )
    axes.set_xticks(columns, [classes[label] for label in shown], rotation=90)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy")
    of = "" if len(shown) == len(known) else f", the {len(shown)} worst of {len(known)} classes"
    axes.set_title(f"accuracy {reference.mean():.4f}, {len(reference)} validation images{of}")


def _draw_latency(axes: Axes, artifacts: Sequence[ProvedArtifact]) -> None:
    sizes = sorted({latency.batch_size for one in artifacts for latency in one.latencies})
    for artifact in artifacts:
        axes.plot(
            [latency.batch_size for latency in artifact.latencies],
            [1e3 * latency.median_s for latency in artifact.latencies],
            ".-",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_xlabel("batch size")
    axes.set_ylabel("milliseconds, one thread")
    axes.set_title("latency of one call")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e3:,.0f} kB"
