"""The engine `grpc` against real servers: same rows, refusals, a server that dies and returns."""

import asyncio
import socket
import threading
import time

import grpc
import numpy as np
import pytest

from clients.batch import (
    BatchJob,
    EngineError,
    GrpcEngine,
    Input,
    PartLimits,
    RemoteModel,
    run_batch,
)
from clients.batch.window import AdaptiveWindow
from clients.errors import ModelNotFoundError, UnavailableError
from tests.clients.batches import (
    assert_same_rows,
    digit_files,
    local_engine,
    read_rows,
    write_images,
)
from tests.clients.conftest import ANSWER, scripted_server
from tests.processes import run_module, running_server


def remote(address: str, **options: object) -> GrpcEngine:
    settings = {"top_k": 3, "in_flight": 64, "timeout_s": 20.0, "patience_s": 60.0} | options
    settings = {"model": "", "version": 0} | settings
    return GrpcEngine(RemoteModel(address=address, **settings))


@pytest.fixture
def images(repository, tmp_path):
    folder = tmp_path / "images"
    write_images(folder, digit_files(repository), 300)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def job(folder, out, **options) -> BatchJob:
    return BatchJob(Input(str(folder)), out, top_k=3, **options)


def test_server_and_local_engine_write_the_same(repository, server, images, tmp_path):
    run_batch(job(images, tmp_path / "local.jsonl"), local_engine(repository, top_k=3))
    command = ("batch", images, "--out", tmp_path / "grpc.jsonl", "--top-k", "3")
    result = run_module("clients", *command, "--address", server.address)
    assert result.returncode == 0, result.stderr
    assert "301 images, 1 errors" in result.stdout
    local, through_server = (read_rows(tmp_path / f"{n}.jsonl") for n in ("local", "grpc"))
    assert local[-1]["path"].endswith("png")
    assert sum(row["error"] is not None for row in local) == 1
    assert_same_rows(local, through_server)


def test_many_images_go_in_a_request(server, images, tmp_path):
    def requests(method: str) -> float:
        return server.metric("convoy_request_duration_seconds_count", method=method, code="OK")

    before = requests("ClassifyBatch"), requests("Classify")
    run_batch(job(images, tmp_path / "out.csv"), remote(server.address))
    after = requests("ClassifyBatch"), requests("Classify")
    assert after == (before[0] - (-301 // 32), before[1])


def test_a_full_queue_slows_the_job_down_and_loses_nothing(repository, images, tmp_path):
    flags = ("--device", "cpu", "--max-queue-size", "2", "--max-batch-size", "1")
    with running_server(repository, *flags) as small:
        engine = remote(small.address, in_flight=64)
        summary = run_batch(job(images, tmp_path / "out.jsonl"), engine)
    assert (summary.counts.images, summary.counts.errors) == (301, 1)
    assert len({row["path"] for row in read_rows(tmp_path / "out.jsonl")}) == 301


def test_a_server_that_is_killed_and_restarted_midway(repository, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out.jsonl"
    expected = write_images(folder, digit_files(repository), 1500)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--device", "cpu", "--port", port)
    done = threading.Event()
    kills = []

    def kill_once(progress):
        if progress.images > 300 and not kills:
            kills.append(progress.images)
            first.process.kill()
            first.process.wait()
            threading.Thread(target=serve_again).start()

    def serve_again():
        with running_server(repository, *flags):
            done.wait(100)

    with running_server(repository, *flags) as first:
        try:
            limits = PartLimits(images=200)
            summary = run_batch(job(folder, out, parts=limits), remote(first.address), kill_once)
        finally:
            done.set()
    assert kills
    assert summary.counts.errors == 0
    assert [row["path"] for row in read_rows(out)] == expected


def test_a_server_that_stays_away_ends_the_job_which_goes_on_later(
    repository, server, images, tmp_path
):
    out = tmp_path / "out.jsonl"
    with running_server(repository, "--device", "cpu") as mortal:

        def kill(progress):
            mortal.process.kill()

        engine = remote(mortal.address, patience_s=0.5)
        with pytest.raises(EngineError, match=r"no answer for \d+ s.*the same command goes on"):
            run_batch(job(images, out, parts=PartLimits(images=10)), engine, kill)
    assert not out.exists()
    summary = run_batch(job(images, out), remote(server.address))
    assert summary.earlier >= 10
    assert len({row["path"] for row in read_rows(out)}) == 301


def test_a_wrong_address_or_model_ends_the_job_at_once(server, images, tmp_path):
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        run_batch(job(images, tmp_path / "out.csv"), remote("127.0.0.1:1"))
    for options in ({"model": "cats"}, {"model": "digits", "version": 9}):
        with pytest.raises(EngineError, match="--model: expected one of digits version 1"):
            run_batch(job(images, tmp_path / "out.csv"), remote(server.address, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_server_that_refuses_the_job_as_a_whole_ends_it(images, tmp_path):
    def forget(request, context, earlier):
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    with scripted_server(forget) as scripted, pytest.raises(ModelNotFoundError, match="gone"):
        run_batch(job(images, tmp_path / "out.csv"), remote(scripted.address))


def test_refusals_shrink_the_window(images, tmp_path):
    """A server with room for four: the job settles near it without losing an image."""
    room = threading.Semaphore(4)
    refused, under_way, most = [], [0], [0]

    def handle(request, context, earlier):
        if not room.acquire(blocking=False):
            refused.append(earlier)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.002)
        under_way[0] -= 1
        room.release()
        return ANSWER

    with scripted_server(handle) as scripted:
        engine = remote(scripted.address, in_flight=64)
        summary = run_batch(job(images, tmp_path / "out.csv"), engine)
        calls = scripted.calls
    assert summary.counts.errors == 0
    assert summary.counts.images == 301
    assert refused
    # A window that ignored the refusals would have all but four of 64 refused, again and again.
    assert len(refused) < calls / 2


async def test_the_window_grows_by_answers_and_halves_once_a_round():
    window = AdaptiveWindow(largest=16, initial=2)

    async def answered(images: int) -> None:
        await window.leave(await window.enter(images), images, refused=False)

    ticket = await window.enter(2)
    blocked = asyncio.ensure_future(window.enter(1))
    await asyncio.sleep(0)
    assert not blocked.done()
    await window.leave(ticket, 2, refused=False)
    assert window.size == 4
    await window.leave(await blocked, 1, refused=False)
    assert window.size == 5
    for _ in range(5):
        await answered(4)
    assert window.size == 16
    tickets = [await window.enter(4) for _ in range(4)]
    for ticket in tickets:
        await window.leave(ticket, 4, refused=True)
    assert window.size == 8
    await answered(8)
    assert window.size == 9
    await answered(4)
    await answered(4)
    assert window.size == 9
    await answered(4)
    assert window.size == 10
    for _ in range(10):
        await window.leave(await window.enter(1), 1, refused=True)
    assert window.size == 1


async def test_a_request_larger_than_a_shrunk_window_goes_alone():
    window = AdaptiveWindow(largest=8, initial=8)
    ticket = await window.enter(4)
    waiter = asyncio.ensure_future(window.enter(8))
    cancelled = asyncio.ensure_future(window.enter(8))
    await asyncio.sleep(0)
    cancelled.cancel()
    await window.leave(ticket, 4, refused=True)
    assert window.size == 4
    assert await asyncio.wait_for(waiter, 10) == 1


def test_pixels_of_another_size_reach_the_server_as_a_picture(server, repository, tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (6, 40, 50, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    run_batch(job(tmp_path / "images.npy", tmp_path / "a.jsonl"), remote(server.address))
    run_batch(job(tmp_path / "images.npy", tmp_path / "b.jsonl"), local_engine(repository, 3))
    assert_same_rows(read_rows(tmp_path / "a.jsonl"), read_rows(tmp_path / "b.jsonl"))
