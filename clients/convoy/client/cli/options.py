"""Options and messages that several commands share."""

import sys
from typing import Annotated

import typer

# Exit codes by the shells' convention: 128 and the signal's number.
INTERRUPTED = 130
TERMINATED = 143

Address = Annotated[
    str,
    typer.Option(
        envvar="CONVOY_ADDRESS",
        help="The server, HOST:PORT. HOST:PORT,HOST:PORT or dns:///NAME:PORT spreads the calls "
        "over several servers.",
    ),
]
Timeout = Annotated[
    float, typer.Option(help="Deadline of a request in seconds, including its retries.", min=0.001)
]
Model = Annotated[str, typer.Option(help="The model's name; optional if there is only one.")]
TopK = Annotated[int, typer.Option(help="The number of classes to return for an image.", min=1)]


def complain(message: object) -> None:
    """Write one line to stderr."""
    print(f"convoy-client: {' '.join(str(message).split())}", file=sys.stderr)
