"""convoy-server, also `python -m convoy.server`."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import tomllib
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal, NoReturn

_LOG_FORMAT = "--log-format"


def main() -> None:
    """Run the server until SIGTERM or SIGINT.

    Exits 0 after a drain and 2, with one line on stderr, when the server cannot start. A second
    signal ends the process at once.
    """
    # Before the slow imports: for the first process of a container the kernel ignores signals
    # without a handler.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    arguments = sys.argv[1:]
    format_ = wanted_log_format(arguments)
    try:
        # Imported here so that an installation of the client alone can name the missing extra.
        import uvloop
        from prometheus_client import CollectorRegistry

        from convoy.server import __version__
        from convoy.server.app import serve
        from convoy.server.errors import StartupError
        from convoy.server.logs import configure_logging
        from convoy.server.settings import parse_settings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("convoy"):
            raise
        extras = "pip install 'convoy-serving[server]' (or [cpu], [openvino])"
        _fail(f"needs {error.name}: {extras}", format_)
    if arguments == ["--version"]:
        print(f"convoy-server {__version__}")
        return
    configure_logging("info", format_)
    try:
        settings = parse_settings(arguments)
        configure_logging(settings.log_level, settings.log_format)
        uvloop.run(serve(settings, CollectorRegistry()))
        _end(0)
    except StartupError as error:
        _fail(str(error), format_)


def _end(code: int) -> NoReturn:
    """End the process; at once if daemon threads still run, such as an abandoned load.

    At its exit the interpreter would stop them inside a runtime's C++ code, which aborts the
    process.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def wanted_log_format(arguments: list[str]) -> Literal["console", "json"]:
    """Return the format of log lines before the settings are read, which may fail."""
    wanted = os.environ.get("CONVOY_LOG_FORMAT")
    if wanted is None:
        with contextlib.suppress(OSError, ValueError):
            config = Path(os.environ.get("CONVOY_CONFIG", "")).read_text()
            wanted = tomllib.loads(config).get("log_format")
    for argument, following in pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name == _LOG_FORMAT:
            wanted = value or following
    return "json" if wanted == "json" else "console"


def _fail(message: str, format_: Literal["console", "json"]) -> NoReturn:
    line = f"convoy-server: {message}"
    if format_ == "json":
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        fields = {"event": "cannot start", "error": message, "level": "critical", "timestamp": now}
        line = json.dumps(fields)
    print(line, file=sys.stderr)
    _end(2)


if __name__ == "__main__":
    main()
