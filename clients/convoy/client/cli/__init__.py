"""The command line of `convoy-client`."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from convoy.client import __version__
from convoy.client.cli.batch import batch, evaluate, merge
from convoy.client.cli.bench import bench, compare
from convoy.client.cli.server import classify, health, models

_BENCH_COMPARE = "bench compare"


class _Commands(TyperGroup):
    """Commands of which one has a name of two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # `bench` itself takes any number of files, so `compare` cannot be a command below it.
        if args[:2] == _BENCH_COMPARE.split():
            args = [_BENCH_COMPARE, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="Classify images with a Convoy server or a local model, inspect the server, and measure "
    "it. The environment variables CONVOY_ADDRESS, CONVOY_TOKEN, CONVOY_TLS, CONVOY_TLS_CA, "
    "CONVOY_TLS_CERTIFICATE, CONVOY_TLS_KEY and CONVOY_GZIP configure the connection.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"convoy-client {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for command in (classify, batch, merge, evaluate, bench, health, models):
    app.command()(command)
app.command(_BENCH_COMPARE)(compare)
