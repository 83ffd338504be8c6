"""convoy-client, also `python -m convoy.client`."""

import sys

import typer

from convoy.client.cli import app
from convoy.client.cli.options import INTERRUPTED, complain
from convoy.client.errors import ClientError


def main() -> None:
    """Run the command line; an error is one line on stderr and a non-zero exit code."""
    # A file name may contain bytes that are not UTF-8.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
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
