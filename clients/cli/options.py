"""Options that several commands share, and how they complain."""

import sys
from typing import Annotated

import typer

# What shells say of a command that Ctrl-C ended: 128 and the signal's number.
INTERRUPTED = 130

Address = Annotated[
    str,
    typer.Option(
        envvar="CONVOY_ADDRESS",
        help="The server's gRPC port, HOST:PORT. IP:PORT,IP:PORT or dns:///NAME:PORT spreads the "
        "calls over several servers.",
    ),
]
Timeout = Annotated[
    float, typer.Option(help="Seconds a request may take, its retries included.", min=0.001)
]
Model = Annotated[
    str, typer.Option(help="The model's name; may be left out where there is one only.")
]
TopK = Annotated[int, typer.Option(help="How many classes to give for a picture.", min=1)]


def complain(message: object) -> None:
    """Writes one line about a mistake to stderr."""
    print(f"convoy-client: {' '.join(str(message).split())}", file=sys.stderr)
