"""One structured line an event, whoever reports it, and a few lines of a flood."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from structlog.testing import capture_logs

from convoy.server.logs import FailureLog
from tests.processes import run_module

SOURCES = """
import logging, threading, warnings
from convoy.server.logs import configure_logging
configure_logging("info", "json")
import structlog
structlog.get_logger().info("ours", number=1)
logging.getLogger("library").warning("theirs %d", 2)
logging.getLogger("library").info("not shown")
warnings.warn("deprecated")
def fail():
    raise ValueError("in a thread")
thread = threading.Thread(target=fail, name="helper")
thread.start()
thread.join()
raise RuntimeError("nobody catches this")
"""


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_source_of_log_lines_writes_json():
    ended = subprocess.run(
        [sys.executable, "-c", SOURCES], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    ours, theirs, warned, in_thread, uncaught = lines(ended.stderr)
    assert (ours["event"], ours["number"], ours["level"]) == ("ours", 1, "info")
    assert (theirs["event"], theirs["logger"], theirs["level"]) == (
        "theirs 2",
        "library",
        "warning",
    )
    assert "deprecated" in warned["event"]
    assert (in_thread["event"], in_thread["thread"]) == ("uncaught exception", "helper")
    assert "ValueError: in a thread" in in_thread["exception"]
    assert "RuntimeError: nobody catches this" in uncaught["exception"]
    assert all("timestamp" in line for line in (ours, theirs, warned, in_thread, uncaught))


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_start_that_fails_is_one_line_of_json(tmp_path, source):
    config = tmp_path / "convoy.toml"
    config.write_text('log_format = "json"\n' if source == "file" else "")
    more = {"file": {"CONVOY_CONFIG": str(config)}, "environment": {"CONVOY_LOG_FORMAT": "json"}}
    flags = ["--log-format=json"] if source == "flag" else []
    ended = run_module(
        "convoy.server", "--port", "x", *flags, env={**os.environ, **more.get(source, {})}
    )
    assert ended.returncode == 2
    (line,) = lines(ended.stderr)
    assert (line["event"], line["level"]) == ("cannot start", "critical")
    assert "--port: " in line["error"]
    assert "--repository is required" in line["error"]


def failing(message: str) -> Exception:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


async def test_one_failure_of_a_flood_is_logged_and_the_others_are_counted():
    failures = FailureLog(window_s=0.01)
    ended = asyncio.Event()
    with capture_logs() as logged:
        ids = {failures.record("request failed", failing(str(number))) for number in range(500)}
        other = failures.record("request failed", KeyError("another cause"))
        assert [line["event"] for line in logged] == ["request failed"] * 2
        # Later than the windows of both.
        asyncio.get_running_loop().call_later(0.02, ended.set)
        await ended.wait()
        counted = logged[2]
        again = failures.record("request failed", failing("later"))
        failures.close()
    (known,) = ids
    assert known == logged[0]["error_id"] != other == logged[1]["error_id"]
    assert (counted["event"], counted["failure"]) == ("failures left out", "request failed")
    assert (counted["error_id"], counted["count"]) == (known, 499)
    assert again == logged[3]["error_id"] != known
    # Nothing was left out since.
    assert len(logged) == 4
