"""The output of the command: tables of versions, proofs and comparisons."""

from collections.abc import Mapping

from rich.table import Table

from convoy.export.formats import Variant, variant_of
from convoy.export.proof import Parity
from convoy.export.versions import Comparison
from convoy.v1 import model_manifest_pb2 as pb


def parity_table(
    title: str,
    parities: Mapping[Variant, Parity],
    openvino: Mapping[Variant, Parity | str] | None = None,
) -> Table:
    """Show how each artifact compares with the eager net."""
    proved = next(iter(parities.values()))
    sizes = ", ".join(map(str, proved.batch_sizes))
    table = Table(
        title=title,
        caption=f"{proved.samples} samples, batch sizes {sizes}, and in another order",
    )
    table.add_column("artifact", no_wrap=True)
    for heading in ("largest difference", "tolerance", "same class", "accuracy"):
        table.add_column(heading, justify="right")
    for variant, parity in parities.items():
        table.add_row(variant.title, *_parity_cells(parity))
        verdict = (openvino or {}).get(variant)
        if isinstance(verdict, Parity):
            table.add_row("  with OpenVINO", *_parity_cells(verdict))
        elif verdict is not None:
            table.add_row("  with OpenVINO", "fails")
    return table


def _parity_cells(parity: Parity) -> tuple[str, str, str, str]:
    accuracy = "not measured"
    if parity.reference_accuracy is not None and parity.accuracy is not None:
        accuracy = f"{parity.reference_accuracy:.2%} → {parity.accuracy:.2%}"
    return (
        f"{parity.max_logit_difference:.1e}",
        f"{parity.tolerance:.1e}",
        f"{parity.argmax_agreement:.1%}",
        accuracy,
    )


def layers_line(int8_layers: tuple[int, int]) -> str:
    """Show how many layers of a net are in int8."""
    return "{} of {} layers in int8, the others in float32".format(*int8_layers)


def version_table(manifest: pb.ModelManifest, int8_layers: tuple[int, int] | None = None) -> Table:
    """Show the content of a manifest, and how many layers of the int8 artifact are in int8."""
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
    for artifact in manifest.artefacts:
        table.add_row(variant_of(artifact).title, _artifact_line(artifact))
    if int8_layers:
        table.add_row("int8", layers_line(int8_layers))
    return table


def canary_line(record: pb.CanaryRecord, manifest_sha256: str) -> str:
    """Show the verdict of a canary.

    Args:
        record: The server's record.
        manifest_sha256: Of the version's manifest.
    """
    verdict = "passed" if record.verdict == "good" else f"rolled back: {record.verdict}"
    signed = "signed" if record.signature else "not signed"
    line = f"{verdict} ({record.decided_at}, {signed})"
    if record.manifest_sha256 != manifest_sha256:
        line += ", for another manifest with this number: servers ignore it"
    return line


def comparison_table(before: pb.ModelManifest, comparison: Comparison) -> Table:
    """Show two versions side by side."""
    table = Table(title=f"{before.name}: {comparison.variant.title}, before and after")
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


def _artifact_line(artifact: pb.Artefact) -> str:
    times = ", ".join(
        f"{1e3 * latency.median_s:.2f} ms for {latency.batch_size}"
        for latency in artifact.latencies
    )
    size_kb = artifact.file.size_bytes / 1e3
    difference = artifact.parity.max_logit_difference
    return f"{size_kb:,.0f} kB, within {difference:.1e} of the eager net; {times or 'not timed'}"
