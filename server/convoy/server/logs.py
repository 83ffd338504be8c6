"""Log lines on stderr: key=value for people, JSON for machines."""

import asyncio
import contextlib
import logging
import sys
import threading
import uuid
from collections.abc import Hashable
from dataclasses import dataclass
from types import TracebackType

import structlog


def configure_logging(level: str, format_: str) -> None:
    """Set up logging for this process.

    Libraries that use Python's logging, warnings, and exceptions that nobody catches become lines
    of the same format.

    Args:
        level: "debug", "info", "warning" or "error".
        format_: "console" or "json".
    """
    number = logging.getLevelName(level.upper())
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if format_ == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    described: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[structlog.typing.Processor] = [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*described, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _StderrLogger(sys.stderr),
    )
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *described],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


class _StderrLogger(structlog.PrintLogger):
    """Ignores write errors: a full disk behind stderr must not end requests."""

    def msg(self, message: str) -> None:
        """Write a line, or drop it."""
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Lose a line that cannot be written, like `_StderrLogger`."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Do nothing."""


logger = structlog.get_logger()


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logger.critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    thread = caught.thread.name if caught.thread else ""
    logger.error("uncaught exception", thread=thread, exc_info=caught.exc_value)


@dataclass(slots=True)
class _Kind:
    """Errors with one cause.

    Attributes:
        error_id: The id of the logged error.
        left_out: The number of errors that were only counted.
    """

    event: str
    error_id: str
    left_out: int = 0


class FailureLog:
    """Logs unexpected errors: one per time window for each cause, and the count of the others.

    A model that fails on every request would otherwise fill the disk with tracebacks. Each error
    has an id in the log: an error that is only counted has the id of the logged one.

    It belongs to the event loop.

    Args:
        window_s: How long further errors with the same cause are only counted.

    Example:
        error_id = failures.record("request failed", error)
    """

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._recent: dict[Hashable, _Kind] = {}

    def record(self, event: str, error: BaseException, **fields: object) -> str:
        """Log an error, or count it; return the id of its cause in the log.

        Args:
            event: What happened.
            error: With its traceback.
            fields: Further fields of the line.
        """
        cause = event, _cause(error)
        if kind := self._recent.get(cause):
            kind.left_out += 1
            return kind.error_id
        kind = self._recent[cause] = _Kind(event, uuid.uuid4().hex[:12])
        logger.error(event, error_id=kind.error_id, exc_info=error, **fields)
        asyncio.get_running_loop().call_later(self._window_s, self._end, cause)
        return kind.error_id

    def close(self) -> None:
        """Log the counts so far."""
        for cause in list(self._recent):
            self._end(cause)

    def _end(self, cause: Hashable) -> None:
        kind = self._recent.pop(cause, None)
        if kind and kind.left_out:
            logger.error(
                "failures left out",
                failure=kind.event,
                error_id=kind.error_id,
                count=kind.left_out,
                within_s=self._window_s,
            )


def _cause(error: BaseException | None) -> Hashable:
    """Return what errors of one cause share: their types and the lines that raised them."""
    found: list[tuple[type[BaseException], str, int]] = []
    while error is not None:
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else ("", 0)
        found.append((type(error), *where))
        error = error.__cause__
    return tuple(found)
