"""Entry point of `convoy-export` and `python -m export`."""

import sys
import warnings

import typer


def main() -> None:
    """Runs the command line; a mistake is one line on stderr and a non-zero exit."""
    # Libraries' notes on their own future concern no user of the command.
    warnings.simplefilter("ignore", FutureWarning)
    from export.cli import app
    from export.errors import ExportError, InputError

    try:
        status = app(prog_name="convoy-export", standalone_mode=False)
    except typer.Abort:
        status = _complain("interrupted", 130)
    except typer.TyperException as error:
        status = _complain(error.format_message(), error.exit_code)
    except InputError as error:
        status = _complain(str(error), 2)
    except ExportError as error:
        status = _complain(str(error), 1)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    print(f"convoy-export: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
