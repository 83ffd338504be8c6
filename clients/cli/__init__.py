"""The command line of `convoy-client`."""

import typer

from clients.cli.batch import batch
from clients.cli.bench import bench
from clients.cli.server import classify, health, models

app = typer.Typer(
    help="Uses a Convoy server: classify pictures, one or many, and look at the server. "
    "CONVOY_TOKEN, CONVOY_TLS, CONVOY_TLS_CA, CONVOY_TLS_CERTIFICATE, CONVOY_TLS_KEY and "
    "CONVOY_GZIP in the environment say how it is reached.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (classify, batch, bench, health, models):
    app.command()(command)
