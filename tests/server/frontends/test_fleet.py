"""Front ends that stop, hang or cannot start, with real processes and an owner in this one."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from convoy.server.errors import StartupError
from convoy.server.frontends.fleet import FrontEnds, Supervision
from convoy.server.frontends.merged_metrics import MergedRegistry
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import LoadedModel, ModelRegistry
from convoy.server.rest.traffic import Traffic, TrafficRecorder
from convoy.server.settings import parse_settings
from tests.server.certificates import Authority

QUICK = Supervision(silence_timeout_s=1.5, first_backoff_s=0.05, last_backoff_s=0.2)
pytestmark = pytest.mark.slow


class Fleet:
    """One front end, and what its owner says of it."""

    def __init__(
        self, folder: Path, drain_timeout_s: float = 20.0, supervision: Supervision = QUICK
    ) -> None:
        certificate, key = Authority().issue_into(folder)
        self.certificate = certificate
        flags = ["--repository", str(folder), "--port", "0", "--front-ends", "1"]
        flags += ["--tls-certificate", str(certificate), "--tls-key", str(key)]
        flags += ["--drain-timeout-s", str(drain_timeout_s)]
        registry = CollectorRegistry()
        ServerMetrics(registry)
        merged = MergedRegistry(registry)
        self.models = ModelRegistry[LoadedModel]()
        self.models.state = ServerState.SERVING
        self.front_ends = FrontEnds(
            parse_settings(flags),
            self.models,
            merged,
            TrafficRecorder(merged, Traffic()),
            supervision,
        )

    @property
    def pid(self) -> int:
        """The process of the front end that takes calls now."""
        (pid,) = self.front_ends.pids
        return pid


@contextlib.asynccontextmanager
async def running(fleet: Fleet) -> AsyncIterator[list[dict[str, object]]]:
    """Starts the front end; yields the log, which the test waits on."""
    with capture_logs() as log:
        await fleet.front_ends.start()
        try:
            yield log
        finally:
            await fleet.front_ends.drain()


async def logged(log: list[dict[str, object]], event: str, count: int = 1) -> dict[str, object]:
    """Waits until an event was logged so many times, and returns the last of them."""
    async with asyncio.timeout(60):
        while len(found := [line for line in log if line["event"] == event]) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found[count - 1]


async def replaced(fleet: Fleet, before: int) -> None:
    """Waits until another front end takes calls."""
    async with asyncio.timeout(60):
        while not fleet.front_ends.pids - {before}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_stopped_front_end_is_found_by_its_silence_and_replaced(tmp_path):
    fleet = Fleet(tmp_path)
    async with running(fleet) as log:
        before = fleet.pid
        os.kill(before, signal.SIGSTOP)
        assert (await logged(log, "front end does not answer"))["pid"] == before
        assert (await logged(log, "front end ended"))["status"] == -signal.SIGKILL
        await replaced(fleet, before)
        after = fleet.pid
        # Long enough to be looked at: its silence while it started must not count against it.
        await asyncio.sleep(3 * QUICK.look_every_s)
        assert fleet.pid == after
        assert fleet.models.reachable


async def test_a_front_end_that_cannot_start_logs_why_backs_off_and_makes_the_server_not_ready(
    tmp_path,
):
    fleet = Fleet(tmp_path)
    valid = fleet.certificate.read_bytes()
    async with running(fleet) as log:
        before = fleet.pid
        fleet.certificate.write_bytes(b"no certificate")
        os.kill(before, signal.SIGKILL)
        failure = await logged(log, "front end cannot start", count=2)
        assert "--tls-certificate: expected PEM files" in str(failure["reason"])
        assert not fleet.models.reachable
        fleet.certificate.write_bytes(valid)
        await replaced(fleet, before)
        async with asyncio.timeout(20):
            while not fleet.models.reachable:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # One line for each front end that ended, whether or not it had started.
        events = [line["event"] for line in log]
        assert events.count("front end ended") == 1


async def test_a_start_that_fails_names_the_cause(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.certificate.write_bytes(b"no certificate")
    with pytest.raises(StartupError, match="--tls-certificate: expected PEM files"):
        await fleet.front_ends.start()
    await fleet.front_ends.drain()


async def test_a_start_that_takes_too_long_ends(tmp_path):
    fleet = Fleet(tmp_path, supervision=replace(QUICK, start_timeout_s=0.01))
    with pytest.raises(StartupError, match=r"a front end took more than 0\.01 s to start"):
        await fleet.front_ends.start()
    started_s = time.monotonic()
    await fleet.front_ends.drain()
    # It is killed, for it has accepted nothing.
    assert time.monotonic() - started_s < 10


async def test_a_front_end_that_stops_does_not_hold_up_the_drain(tmp_path):
    fleet = Fleet(tmp_path, drain_timeout_s=0.5)
    async with running(fleet) as log:
        os.kill(fleet.pid, signal.SIGSTOP)
        started_s = time.monotonic()
        await fleet.front_ends.drain()
        # The time-out, and a second of grace.
        assert time.monotonic() - started_s < 1.5 + 1.0
        assert [line["event"] for line in log] == ["front end killed after the drain"]
