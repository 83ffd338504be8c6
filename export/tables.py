"""What the command shows: rich tables of versions, proofs and comparisons."""

from collections.abc import Mapping

from rich.table import Table

from convoy.v1 import model_manifest_pb2 as pb
from export.comparison import Comparison
from export.formats import Variant
from export.proof import Parity


def parity_table(title: str, parities: Mapping[Variant, Parity]) -> Table:
    """Shows how each artefact compares with the eager net."""
    proved = next(iter(parities.values()))
    sizes = ", ".join(map(str, proved.batch_sizes))
    table = Table(
        title=title,
        caption=f"{proved.samples} samples, batch sizes {sizes}, and in another order",
    )
    table.add_column("artefact", no_wrap=True)
    for heading in ("largest difference", "tolerance", "same class", "accuracy"):
        table.add_column(heading, justify="right")
    for variant, parity in parities.items():
        table.add_row(
            variant.file_name,
            f"{parity.max_logit_difference:.1e}",
            f"{parity.tolerance:.1e}",
            f"{parity.argmax_agreement:.1%}",
            f"{parity.reference_accuracy:.2%} → {parity.accuracy:.2%}",
        )
    return table


def version_table(manifest: pb.ModelManifest) -> Table:
    """Shows what a manifest says about a version."""
    provenance = manifest.provenance
    table = Table(title=f"{manifest.name} version {manifest.version}", show_header=False)
    accuracy = ", ".join(f"{split} {value:.2%}" for split, value in provenance.accuracy.items())
    facts = {
        "created": f"{manifest.created_at} by {manifest.producer}",
        "net": f"{provenance.architecture} {provenance.architecture_arguments_json}",
        "cost": f"{provenance.parameters:,} parameters, {provenance.multiply_adds:,} multiply-adds",
        "trained on": f"{provenance.data} ({accuracy or 'accuracy not known'})",
        "input": f"{manifest.input.name} {manifest.input.datatype} {list(manifest.input.shape)}",
        "classes": f"{len(manifest.labels)}: {', '.join(manifest.labels[:10])}"
        + (", …" if len(manifest.labels) > 10 else ""),
        "checkpoint": f"SHA-256 {provenance.checkpoint_sha256}",
    }
    if manifest.abstain_threshold:
        facts["abstains"] = f"below a probability of {manifest.abstain_threshold:g}"
    for name, value in facts.items():
        table.add_row(name, value)
    for artefact in manifest.artefacts:
        table.add_row(artefact.file.name, _artefact_line(artefact))
    return table


def comparison_table(before: pb.ModelManifest, comparison: Comparison) -> Table:
    """Shows two versions beside each other."""
    table = Table(title=f"{before.name}: {comparison.variant.file_name}, before and after")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("accuracy", *(f"{value:.2%}" for value in comparison.accuracy))
    table.add_row("size, kB", *(f"{value / 1e3:,.0f}" for value in comparison.size_bytes))
    table.add_row("one image, ms", *(f"{1e3 * value:.3f}" for value in comparison.single_image_s))
    table.add_section()
    table.add_row("same class", "", f"{comparison.agreement:.2%} of {comparison.samples}")
    for change in comparison.changes:
        table.add_row(f"sample {change.index}, a {change.truth!r}", change.before, change.after)
    return table


def _artefact_line(artefact: pb.Artefact) -> str:
    times = ", ".join(
        f"{1e3 * latency.median_s:.2f} ms for {latency.batch_size}"
        for latency in artefact.latencies
    )
    size_kb = artefact.file.size_bytes / 1e3
    difference = artefact.parity.max_logit_difference
    return f"{size_kb:,.0f} kB, within {difference:.1e} of the eager net; {times or 'not timed'}"
