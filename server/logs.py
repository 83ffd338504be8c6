"""Log lines on stderr: key=value for people, JSON for machines."""

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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
