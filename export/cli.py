"""The command line of `convoy-export`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from convoy.v1 import model_manifest_pb2 as pb
from export.formats import ArtefactFormat, Variant

DEFAULT_COMMAND = "publish"


class _PublishByDefault(TyperGroup):
    """Takes `convoy-export CHECKPOINT …` for `convoy-export publish CHECKPOINT …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = {*self.commands, "--help", "--install-completion", "--show-completion"}
        return super().parse_args(
            ctx, args if args and args[0] in ours else [DEFAULT_COMMAND, *args]
        )


app = typer.Typer(
    cls=_PublishByDefault,
    help="Turns a checkpoint into a proved model repository version. "
    "CHECKPOINT as the first word is short for 'publish CHECKPOINT'.",
    pretty_exceptions_enable=False,
)

Repository = Annotated[
    Path, typer.Option(help="The model repository; versions appear in REPOSITORY/NAME/.")
]


@app.command(DEFAULT_COMMAND)
def publish(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A checkpoint written by convoy-train."),
    ],
    *,
    name: Annotated[str, typer.Option(help="Name the model is served under.")],
    repository: Repository = Path("models"),
    data: Annotated[
        str | None,
        typer.Option(help="Data to prove the artefacts on; by default what the checkpoint names."),
    ] = None,
    formats: Annotated[
        list[ArtefactFormat], typer.Option("--format", help="Artefact to write; repeat for more.")
    ] = [ArtefactFormat.ONNX, ArtefactFormat.TORCHSCRIPT],  # noqa: B006, typer copies it
    script: Annotated[
        bool,
        typer.Option(
            "--script",
            help="Compile TorchScript from the source code, with control flow, instead of tracing.",
        ),
    ] = False,
) -> None:
    """Exports a checkpoint, proves every artefact and publishes the next version of NAME.

    An artefact that differs from the eager net by more than its tolerance publishes nothing.
    """
    from export.pipeline import ExportOptions, export
    from export.publishing import ModelFolder
    from export.samples import load_real
    from export.source import from_checkpoint

    target = ModelFolder(repository, name)
    source = from_checkpoint(checkpoint)
    options = ExportOptions([Variant(form) for form in dict.fromkeys(formats)], script)
    published = export(source, load_real(source, data), target, options)
    console = Console()
    console.print(parity_table(published.manifest))
    console.print(f"published {published.path}", highlight=False, soft_wrap=True)


def parity_table(manifest: pb.ModelManifest) -> Table:
    """Shows how each artefact of a version compares with the eager net."""
    proved = manifest.artefacts[0].parity
    sizes = ", ".join(map(str, proved.batch_sizes))
    table = Table(
        title=f"{manifest.name} version {manifest.version} against the eager net",
        caption=f"{proved.samples} samples, batch sizes {sizes}, and in another order",
    )
    table.add_column("artefact", no_wrap=True)
    for heading in ("kB", "largest difference", "tolerance", "same class"):
        table.add_column(heading, justify="right")
    for artefact in manifest.artefacts:
        parity = artefact.parity
        table.add_row(
            artefact.file.name,
            f"{artefact.file.size_bytes / 1e3:,.0f}",
            f"{parity.max_logit_difference:.1e}",
            f"{parity.tolerance:.1e}",
            f"{parity.argmax_agreement:.1%}",
        )
    return table
