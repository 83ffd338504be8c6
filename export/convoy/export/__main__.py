"""Entry point of `convoy-export` and `python -m convoy.export`."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer


def main() -> None:
    """Run the command line; an error is one line on stderr and a non-zero exit code."""
    # Deprecation warnings of libraries do not concern the user of the command.
    warnings.simplefilter("ignore", FutureWarning)
    from convoy.export.cli import app
    from convoy.export.errors import ExportError, InputError

    try:
        with _warnings_shown():
            status = app(prog_name="convoy-export", standalone_mode=False)
    except typer.Abort:
        status = _complain("interrupted", 130)
    except typer.TyperException as error:
        status = _complain(error.format_message(), error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("convoy"):
            raise
        extras = "convoy-serving[export,server]"
        status = _complain(f"needs {error.name}: pip install '{extras}'", 2)
    except InputError as error:
        status = _complain(str(error), 2)
    except ExportError as error:
        status = _complain(str(error), 1)
    sys.exit(status)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print the warnings of this package and of training as lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("convoy-export: warning: %(message)s"))
    logger = logging.getLogger("convoy")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _complain(message: str, status: int) -> int:
    print(f"convoy-export: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
