"""convoy-client, also `python -m clients`."""

import sys

import typer

from clients.cli import app
from clients.cli.options import INTERRUPTED, complain
from clients.errors import ClientError


def main() -> None:
    """Runs the command line; a mistake is one line on stderr and a non-zero exit."""
    try:
        status = app(prog_name="convoy-client", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        complain("interrupted")
        status = INTERRUPTED
    except typer.TyperException as error:
        complain(error.format_message())
        status = error.exit_code
    except ClientError as error:
        complain(error)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
