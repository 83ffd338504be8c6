"""Log lines on stderr: key=value for people, JSON for machines."""

import contextlib
import logging
import sys

import structlog


def configure_logging(level: str, format_: str) -> None:
    """Sets up structlog for this process.

    Args:
        level: "debug", "info", "warning" or "error".
        format_: "console" or "json".
    """
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if format_ == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=lambda *_: _StderrLogger(sys.stderr),
    )


class _StderrLogger(structlog.PrintLogger):
    """Goes on where a line cannot be written: a full disk behind stderr must not end requests."""

    def msg(self, message: str) -> None:
        """Writes a line, or loses it."""
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg
