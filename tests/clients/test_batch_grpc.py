"""The engine `grpc` against real servers: same rows, rejections, faults, restarts."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoy.client.batch import (
    BatchJob,
    EngineError,
    GrpcEngine,
    Input,
    LocalEngine,
    LocalModel,
    OutputError,
    PartLimits,
    Predictor,
    RemoteModel,
    retry_errors,
    run_batch,
)
from convoy.client.batch.remote import AdaptiveWindow
from convoy.client.batch.tables import Layout, table_for
from convoy.client.errors import ModelNotFoundError, UnavailableError
from convoy.v1 import classifier_pb2 as pb
from tests.clients.batches import (
    assert_same_rows,
    digit_files,
    local_engine,
    read_rows,
    write_images,
)
from tests.clients.conftest import ANSWER, answer, scripted_server
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
    result = run_module("convoy.client", *command, "--address", server.address)
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
    assert before[0] < after[0] <= before[0] - (-301 // 32)
    assert after[1] == before[1]


def test_a_request_holds_no_more_images_than_the_server_takes(repository, images, tmp_path):
    with running_server(repository, "--device", "cpu", "--max-request-images", "9") as server:
        summary = run_batch(job(images, tmp_path / "out.csv"), remote(server.address))
        requests = "convoy_request_duration_seconds_count"
        assert server.metric(requests, method="ClassifyBatch", code="OK") == -(-301 // 9)
        assert server.metric(requests, method="ClassifyBatch", code="INVALID_ARGUMENT") == 0
    assert (summary.counts.images, summary.counts.errors) == (301, 1)


def test_an_interrupt_while_the_server_works_keeps_the_rows_so_far(images, tmp_path):
    def interrupt(request, context, earlier):
        if earlier == 200:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        return answer_by_version(request, 1)

    command = [sys.executable, "-m", "convoy.client", "batch", images, "--out", tmp_path / "o.csv"]
    with scripted_server(interrupt) as scripted:
        command += ["--address", scripted.address, "--in-flight", "32"]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "convoy-client: interrupted; the same command resumes\n"
    with scripted_server(lambda request, *_: answer_by_version(request, 1)) as scripted:
        again = BatchJob(Input(str(images)), tmp_path / "o.csv")
        summary = run_batch(again, remote(scripted.address, top_k=1))
    assert 0 < summary.earlier < summary.counts.images == 301


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


def test_an_absent_server_ends_the_job_which_resumes_later(repository, server, images, tmp_path):
    out = tmp_path / "out.jsonl"
    with running_server(repository, "--device", "cpu") as mortal:

        def kill(progress):
            mortal.process.kill()

        engine = remote(mortal.address, patience_s=0.5)
        with pytest.raises(EngineError, match=r"no answer for \d+ s.*the same command resumes"):
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


def test_a_server_that_rejects_the_job_as_a_whole_ends_it(images, tmp_path):
    def forget(request, context, earlier):
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    with scripted_server(forget) as scripted, pytest.raises(ModelNotFoundError, match="gone"):
        run_batch(job(images, tmp_path / "out.csv"), remote(scripted.address))


def test_rejections_shrink_the_window(images, tmp_path):
    """A server with room for four: the job settles near it without losing an image."""
    room = threading.Semaphore(4)
    rejected, under_way, most = [], [0], [0]

    def handle(request, context, earlier):
        if not room.acquire(blocking=False):
            rejected.append(earlier)
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
    assert rejected
    # A window that ignored the rejections would have all but four of 64 rejected, again and again.
    assert len(rejected) < calls / 2


async def test_the_window_grows_by_answers_and_halves_once_a_round():
    window = AdaptiveWindow(largest=16, initial=2)

    async def answered(images: int) -> None:
        await window.release(await window.acquire(images), images, rejected=False)

    ticket = await window.acquire(2)
    blocked = asyncio.ensure_future(window.acquire(1))
    await asyncio.sleep(0)
    assert not blocked.done()
    await window.release(ticket, 2, rejected=False)
    assert window.size == 4
    await window.release(await blocked, 1, rejected=False)
    assert window.size == 5
    for _ in range(5):
        await answered(4)
    assert window.size == 16
    tickets = [await window.acquire(4) for _ in range(4)]
    for ticket in tickets:
        await window.release(ticket, 4, rejected=True)
    assert window.size == 8
    await answered(8)
    assert window.size == 9
    await answered(4)
    await answered(4)
    assert window.size == 9
    await answered(4)
    assert window.size == 10
    for _ in range(10):
        await window.release(await window.acquire(1), 1, rejected=True)
    assert window.size == 1


async def test_a_request_larger_than_a_shrunk_window_goes_alone():
    window = AdaptiveWindow(largest=8, initial=8)
    ticket = await window.acquire(4)
    waiter = asyncio.ensure_future(window.acquire(8))
    cancelled = asyncio.ensure_future(window.acquire(8))
    await asyncio.sleep(0)
    cancelled.cancel()
    await window.release(ticket, 4, rejected=True)
    assert window.size == 4
    assert await asyncio.wait_for(waiter, 10) == 1


def test_pixels_of_another_size_reach_the_server_as_an_encoded_image(server, repository, tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (6, 40, 50, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    run_batch(job(tmp_path / "images.npy", tmp_path / "a.jsonl"), remote(server.address))
    run_batch(job(tmp_path / "images.npy", tmp_path / "b.jsonl"), local_engine(repository, 3))
    assert_same_rows(read_rows(tmp_path / "a.jsonl"), read_rows(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_a_transient_fault_of_the_server_is_no_error_of_an_image(images, tmp_path, code):
    def fail_at_first(request, context, earlier):
        if earlier < 60:
            context.abort(code, "a fault that passes")
        return ANSWER

    with scripted_server(fail_at_first) as scripted:
        summary = run_batch(job(images, tmp_path / "out.csv"), remote(scripted.address))
    assert (summary.counts.images, summary.counts.errors) == (301, 0)


def test_an_image_that_the_server_fails_on_is_an_error_and_stops_no_other(images, tmp_path):
    attempts = []

    def fail_on_one(request, context, earlier):
        if request.encoded == b"no image":
            attempts.append(earlier)
            context.abort(grpc.StatusCode.INTERNAL, "decoder crashed")
        return ANSWER

    with scripted_server(fail_on_one) as scripted:
        summary = run_batch(job(images, tmp_path / "out.jsonl"), remote(scripted.address))
    assert (summary.counts.images, summary.counts.errors) == (301, 1)
    assert len(attempts) == 4
    (row,) = [row for row in read_rows(tmp_path / "out.jsonl") if row["error"]]
    assert (row["path"], row["error"]) == ("broken.png", "decoder crashed")


def test_a_server_that_always_fails_ends_the_job_which_resumes(images, tmp_path):
    fails = threading.Event()

    def fail(request, context, earlier):
        if earlier > 100 or fails.is_set():
            fails.set()
            context.abort(grpc.StatusCode.INTERNAL, "out of order")
        return ANSWER

    out = tmp_path / "out.csv"
    limits = PartLimits(images=10)
    with scripted_server(fail) as scripted:
        engine = remote(scripted.address, patience_s=0.5, in_flight=8)
        with pytest.raises(EngineError, match=r"no answer for .* out of order; the same command"):
            run_batch(job(images, out, parts=limits), engine)
    with scripted_server(answer) as sound:
        summary = run_batch(job(images, out, parts=limits), remote(sound.address))
    assert (summary.counts.images, summary.counts.errors) == (301, 0)
    assert summary.earlier >= 10


def test_a_restarted_server_without_its_model_yet_is_waited_for(images, tmp_path):
    def forget_for_a_while(request, context, earlier):
        if 50 < earlier < 90:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return ANSWER

    with scripted_server(forget_for_a_while) as scripted:
        summary = run_batch(job(images, tmp_path / "out.csv"), remote(scripted.address))
    assert (summary.counts.images, summary.counts.errors) == (301, 0)


def test_several_versions_that_answered_are_reported(images, tmp_path):
    def switch(request, context, earlier):
        scores = [pb.ClassScore(label="yes")]
        return pb.ClassifyResponse(model="m", version=1 + (earlier >= 100), classes=scores)

    out = tmp_path / "out.csv"
    with scripted_server(switch) as scripted:
        command = ("batch", images, "--out", out, "--address", scripted.address)
        result = run_module("convoy.client", *command)
    assert result.returncode == 0, result.stderr
    expected = (
        "convoy-client: several model versions answered: m/2 (201), m/1 (100); with --version"
    )
    assert result.stderr.startswith(expected)
    versions = json.loads((tmp_path / "out.csv.summary.json").read_text())["versions"]
    assert versions == {"m/1": 100, "m/2": 201}


def answer_by_version(request, default: int):
    """The answer of a server whose version in service is `default`."""
    scores = [pb.ClassScore(label="yes")]
    return pb.ClassifyResponse(model="m", version=request.version or default, classes=scores)


def test_a_job_keeps_its_version_while_the_server_has_it(images, tmp_path):
    """Another version goes into service, the job is interrupted, and errors are retried."""

    def switch(request, context, earlier):
        scripted.versions = (1, 2) if earlier >= 50 else (1,)
        if request.encoded == b"no image":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no image")
        return answer_by_version(request, scripted.versions[-1])

    def stop(progress):
        if progress.images > 100:
            raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    with scripted_server(switch) as scripted:
        with pytest.raises(KeyboardInterrupt):
            run_batch(job(images, out), remote(scripted.address), stop)
        summary = run_batch(job(images, out), remote(scripted.address))
        assert summary.earlier > 100
        assert (summary.counts.versions, summary.counts.errors) == ({"m/1": 300}, 1)
        (images / "broken.png").write_bytes(b"another image")
        repaired = retry_errors(job(images, out), remote(scripted.address), id, pytest.fail)
        assert repaired.counts.versions == {"m/1": 301}
        # A new job takes the version in service.
        fresh = run_batch(job(images, tmp_path / "new.jsonl"), remote(scripted.address))
        assert fresh.counts.versions == {"m/2": 301}


def test_a_job_continues_with_another_version_when_its_own_is_gone(images, tmp_path):
    def replace(request, context, earlier):
        if earlier >= 100:
            scripted.versions = (2,)
        if request.version not in (0, *scripted.versions):
            context.abort(grpc.StatusCode.NOT_FOUND, "version: served in version 2")
        return answer_by_version(request, scripted.versions[-1])

    with scripted_server(replace) as scripted:
        out = tmp_path / "out.jsonl"
        summary = run_batch(job(images, out), remote(scripted.address))
        assert summary.counts.errors == 0
        assert summary.counts.versions.keys() == {"m/1", "m/2"}
        # A job that named its version waits for it instead.
        scripted.versions = (1, 2)
        scripted.metadata.clear()
        strict = remote(scripted.address, version=1, patience_s=0.5, model="m")
        with pytest.raises(EngineError, match=r"no answer for .*served in version 2"):
            run_batch(job(images, tmp_path / "strict.jsonl"), strict)


def test_the_logits_of_both_engines_are_the_same(repository, server, images, tmp_path):
    np.save(
        tmp_path / "images.npy", np.random.default_rng(3).integers(0, 256, (9, 32, 32, 3), "u1")
    )
    source = Input((str(images), str(tmp_path / "images.npy")))
    tables = {}
    for name, engine in {
        "local": LocalEngine(Predictor(LocalModel(repository), 3, ("logits",)), 16, 2),
        "grpc": remote(server.address, outputs=("logits",)),
    }.items():
        for suffix in ("jsonl", "parquet"):
            out = tmp_path / f"{name}.{suffix}"
            limits = PartLimits(images=40)
            run_batch(BatchJob(source, out, top_k=3, outputs=("logits",), parts=limits), engine)
            tables[out.name] = read_rows(out)
    expected = tables["local.jsonl"]
    assert len(expected) == 310
    for table in tables.values():
        for row, other in zip(table, expected, strict=True):
            assert row["label"] == other["label"]
            if other["logits"] is None:
                assert row["logits"] is None
                assert row["error"]
                continue
            np.testing.assert_allclose(row["logits"], other["logits"], atol=1e-4)
            assert np.argmax(row["logits"]) == row["index"]
    columns = {"path", "logits", "label", "labels", "index", "indices", "probability"}
    assert columns < expected[0].keys()


@pytest.mark.parametrize("engine", ["local", "grpc"])
def test_an_output_that_the_model_lacks_is_one_line(repository, server, images, tmp_path, engine):
    command = ("batch", images, "--engine", engine, "--repository", repository)
    flags = ("--address", server.address, "--columns", "embeddings")
    out = tmp_path / "out.jsonl"
    result = run_module("convoy.client", *command, *flags, "--out", out)
    assert result.returncode == 1
    line = r"convoy-client: --columns: .*logits.*'embeddings'.*\n"
    assert re.fullmatch(line, result.stderr)
    assert not out.exists()


def test_csv_takes_no_lists():
    with pytest.raises(OutputError, match="--columns: CSV has no lists"):
        table_for(Path("out.csv"), Layout(outputs=("logits",)))
    with pytest.raises(OutputError, match="--columns: the table has a column 'labels'"):
        Layout(outputs=("labels",))
    with pytest.raises(OutputError, match="--pass-columns: the table has a column 'logits'"):
        Layout(columns=("logits",), outputs=("logits",))
