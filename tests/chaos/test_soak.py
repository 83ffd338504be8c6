"""`make soak` in short: as many requests as a minute brings, memory held to a wide bound."""

import asyncio

from tests.chaos.soak import Soak, faults
from tests.processes import running_server
from tests.server.conftest import publish_version


def test_a_short_soak_shows_no_fault(tmp_path):
    models = tmp_path / "models"
    publish_version(models / "colors" / "1")
    with running_server(models, "--device", "cpu", "--poll-s", "0.2") as server:
        soak = Soak(server, models, 1, requests=6000, swap_every_s=0.5, sample_every_s=0.1)
        asyncio.run(soak.run())
        exit_code = server.stop()
    # So short a run still fills caches; a leak of a request's pixels would more than double it.
    assert faults(soak, exit_code, max_growth=0.5) == []
    assert soak.codes["OK"] > 0
    assert soak.codes["CANCELLED"] > 0
