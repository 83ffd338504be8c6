"""Batch jobs on real models: every input once, also after kills; tables and their formats."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.client.batch import (
    BatchError,
    BatchJob,
    Input,
    InputError,
    OutputError,
    PartLimits,
    Shard,
    run_batch,
)
from tests.clients.batches import digit_files, local_engine, read_rows, write_images
from tests.processes import run_module

COUNT = 40
FORMATS = ("csv", "jsonl", "parquet")


@pytest.fixture(scope="module")
def engine(repository):
    return local_engine(repository, top_k=2)


@pytest.fixture
def images(repository, tmp_path) -> Path:
    """A folder of digits, one of them broken."""
    folder = tmp_path / "images"
    write_images(folder, digit_files(repository), COUNT)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def job(folder: object, out: Path, **options: object) -> BatchJob:
    return BatchJob(Input(str(folder)), out, top_k=2, **options)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_has_a_row_for_every_image_and_an_error_for_a_bad_one(
    repository, engine, images, tmp_path, suffix
):
    out = tmp_path / "out" / f"table.{suffix}"
    out.parent.mkdir()
    summary = run_batch(job(images, out), engine)
    rows = read_rows(out)
    assert [row["path"] for row in rows] == names(images)
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        best = samples["logits"].argmax(axis=1)
    for row in rows:
        if row["path"] == "broken.png":
            assert "expected a JPEG, PNG, WEBP, BMP, GIF file, got 8 other bytes" in row["error"]
            assert not row["label"]
            assert not row["model"]
            continue
        assert not row["error"]
        assert (row["model"], int(row["version"])) == ("digits", 1)
        index = best[int(Path(row["path"]).stem) % len(best)]
        assert (row["label"], int(row["index"])) == (str(index), index)
        second = float(row["probability_2"] if suffix == "csv" else row["probabilities"][1])
        assert 1 >= float(row["probability"]) >= second >= 0
    assert (summary.counts.images, summary.counts.errors) == (COUNT + 1, 1)
    assert summary.classes == Counter(row["label"] for row in rows if row["label"])
    assert left_in(out.parent) == {out.name, f"{out.name}.summary.json"}


def test_the_formats_hold_the_same(engine, images, tmp_path):
    tables = {}
    for suffix in FORMATS:
        out = tmp_path / f"table.{suffix}"
        run_batch(job(images, out, parts=PartLimits(images=7)), engine)
        tables[suffix] = read_rows(out)
    lines = tables["jsonl"]
    for line, columns, values in zip(lines, tables["parquet"], tables["csv"], strict=True):
        assert line.pop("probabilities") == pytest.approx(columns.pop("probabilities"))
        assert line.pop("probability") == pytest.approx(columns.pop("probability"))
        assert line == columns
        for name in ("path", "label", "index", "model", "version", "error"):
            assert ("" if line[name] is None else str(line[name])) == values[name]
        assert line["labels"][1:] == ([values["label_2"]] if values["label_2"] else [])


def test_the_python_interface_reads_every_input(repository, engine, images, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((5, 40, 50, 3), np.uint8))
    summary = run_batch(job(tmp_path / "images.npy", tmp_path / "o.jsonl"), engine)
    assert summary.counts.errors == 0
    assert [row["path"] for row in read_rows(tmp_path / "o.jsonl")] == list("01234")


KILLED_AT_STEP = """
import os, pathlib, signal, sys
import onnxruntime
from convoy.client.batch import BatchJob, Input, LocalEngine, LocalModel
from convoy.client.batch import PartLimits, Predictor, run_batch

folder, repository, out, suffix = map(pathlib.Path, sys.argv[1:5])

def run(out, kill_at=0):
    steps = 0
    def count(event, arguments):
        nonlocal steps
        # Every step that changes a file's name, content or existence begins with one of these.
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            if str(out) in str(arguments[0]):
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    engine = LocalEngine(Predictor(LocalModel(repository), 1), 4, 1)
    run_batch(BatchJob(Input(str(folder)), out, parts=PartLimits(images=8)), engine)
    return steps

def in_child(out, kill_at=0):
    child = os.fork()
    if not child:
        run(out, kill_at)
        os._exit(0)
    return os.waitpid(child, 0)[1]

kills = 0
for step in range(1, 1000, int(sys.argv[5])):
    table = out / f"{step}{suffix}"
    status = in_child(table, step)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    assert in_child(table) == 0
print(kills)
"""


# Each of Parquet's runs loads pyarrow, which does not survive a fork.
@pytest.mark.parametrize(("suffix", "stride"), [("jsonl", 1), ("parquet", 6)])
def test_a_job_killed_at_any_step_resumes_and_has_every_input_once(
    repository, tmp_path, suffix, stride
):
    """Kills a job at its first file operation, another at its second, and so on to the last."""
    folder, out = tmp_path / "images", tmp_path / "out"
    expected = write_images(folder, digit_files(repository), 10)
    out.mkdir()
    command = [sys.executable, "-c", KILLED_AT_STEP, folder, repository, out, f".{suffix}"]
    command += [str(stride)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert result.returncode == 0, result.stderr
    kills = int(result.stdout)
    assert kills > 20 // stride
    tables = sorted(out.glob(f"*.{suffix}"))
    assert len(tables) == kills + 1
    whole = read_rows(tables[-1])
    assert [row["path"] for row in whole] == expected
    for table in tables:
        assert read_rows(table) == whole, table
    assert {"".join(path.suffixes) for path in out.iterdir()} == {
        f".{suffix}",
        f".{suffix}.summary.json",
    }


def test_a_command_killed_at_random_moments_resumes(repository, tmp_path):
    """The whole command in a process of its own, killed while it reads, runs and writes."""
    folder, out = tmp_path / "images", tmp_path / "out.jsonl"
    expected = write_images(folder, digit_files(repository), 1000)
    command = [sys.executable, "-m", "convoy.client", "batch", str(folder), "--out", str(out)]
    command += ["--engine", "local", "--repository", str(repository), "--part-size", "50"]
    draw = random.Random(6)
    kills = 0
    journal = tmp_path / "out.jsonl.parts" / "journal"
    while not out.exists():
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            before = journal.stat().st_size if journal.exists() else 0
            # Waits for progress, then for any moment: a slow machine is killed no earlier.
            while process.poll() is None and not (
                journal.exists() and journal.stat().st_size > before
            ):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert finished.returncode == 0, finished.stderr
    assert [row["path"] for row in read_rows(out)] == expected
    assert left_in(tmp_path) == {"images", "out.jsonl", "out.jsonl.summary.json"}


def test_a_resumed_job_does_nothing_twice(engine, images, tmp_path):
    out = tmp_path / "out.csv"
    done: list[str] = []

    class Stopping:
        """The engine, until it has handed over some rows."""

        identity = engine.identity
        labels = staticmethod(engine.labels)

        def __init__(self, rows: int) -> None:
            self._rows = rows

        def predict(self, source, start, version=0):
            for rows in engine.predict(source, start):
                for row in rows:
                    if self._rows == 0:
                        raise KeyboardInterrupt
                    self._rows -= 1
                    done.append(row.key)
                    yield [row]

    limits = PartLimits(images=5)
    with pytest.raises(KeyboardInterrupt):
        run_batch(job(images, out, parts=limits), Stopping(17))
    summary = run_batch(job(images, out, parts=limits), Stopping(1000))
    # An interrupt keeps also what is in no full part.
    assert summary.earlier == 17
    assert done == names(images)
    assert [row["path"] for row in read_rows(out)] == names(images)


def test_a_part_is_closed_when_it_is_old(engine, images, tmp_path):
    clock = iter(range(0, 1000, 4))
    closed = []
    run_batch(
        job(images, tmp_path / "out.csv", parts=PartLimits(age_s=10)),
        engine,
        lambda progress: closed.append(len(list(tmp_path.glob("out.csv.parts/part-*.csv")))),
        clock=lambda: float(next(clock)),
    )
    assert closed[-1] >= 1


def test_a_torn_journal_and_leftovers_do_not_count(engine, images, tmp_path):
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(job(images, out, parts=PartLimits(images=1)), engine, stop)
    with (parts / "journal").open("a") as journal:
        journal.write('{"part": "part-00000001.jsonl", "ima')
    (parts / "part-00000001.jsonl").write_text('{"path": "twice"}\n')
    (parts / "part-00000002.jsonl.tmp").write_text("half")
    run_batch(job(images, out), engine)
    assert [row["path"] for row in read_rows(out)] == names(images)


def test_a_lost_part_is_noticed(engine, images, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    limits = PartLimits(images=1)
    with pytest.raises(KeyboardInterrupt):
        run_batch(job(images, tmp_path / "out.csv", parts=limits), engine, stop)
    (tmp_path / "out.csv.parts" / "part-00000000.csv").unlink()
    with pytest.raises(OutputError, match=r"part-00000000\.csv: is missing"):
        run_batch(job(images, tmp_path / "out.csv"), engine)


def test_another_job_does_not_resume_the_parts(engine, images, tmp_path):
    out = tmp_path / "out.csv"

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(job(images, out), engine, stop)
    with pytest.raises(OutputError, match=r"unfinished job that differs \(evaluate: False"):
        run_batch(job(images, out, evaluate=True), engine)
    other = tmp_path / "images" / "deep"
    with pytest.raises(OutputError, match="input"):
        run_batch(job(other, out), engine)
    kept = left_in(tmp_path / "out.csv.parts")
    with pytest.raises(InputError, match="depe: No such file"):
        run_batch(job(other.with_name("depe"), out, overwrite=True), engine)
    assert left_in(tmp_path / "out.csv.parts") == kept
    with pytest.raises(OutputError, match=r"unfinished job that differs \(input: "):
        run_batch(job(other, out), engine)
    run_batch(job(other, out, overwrite=True), engine)
    assert [row["path"] for row in read_rows(out)] == names(other)


def test_a_changed_archive_is_not_resumed(engine, tmp_path):
    path, out = tmp_path / "images.npy", tmp_path / "out.csv"

    def stop(progress):
        raise KeyboardInterrupt

    np.save(path, np.zeros((50, 32, 32, 3), np.uint8))
    with pytest.raises(KeyboardInterrupt):
        run_batch(job(path, out), engine, stop)
    np.save(path, np.zeros((51, 32, 32, 3), np.uint8))
    with pytest.raises(OutputError, match="modified_ns"):
        run_batch(job(path, out), engine)


def test_a_finished_job_is_repeated_on_demand_only(engine, images, tmp_path):
    out = tmp_path / "out.csv"
    first = run_batch(job(images, out), engine)
    (images / "new.png").write_bytes(b"no image")
    again = run_batch(job(images, out), engine)
    assert again.earlier == again.counts.images == first.counts.images
    assert again.classes == first.classes
    with pytest.raises(OutputError, match="written by another job; use --overwrite"):
        run_batch(BatchJob(Input(str(images)), out, top_k=1), engine)
    assert run_batch(job(images, out, overwrite=True), engine).counts.images == COUNT + 2
    (tmp_path / "out.csv.summary.json").unlink()
    with pytest.raises(OutputError, match="--overwrite"):
        run_batch(job(images, out), engine)


def test_two_processes_do_not_write_one_table(engine, images, tmp_path):
    def start_another(progress):
        with pytest.raises(OutputError, match="another process writes"):
            run_batch(job(images, tmp_path / "out.csv"), engine)

    run_batch(job(images, tmp_path / "out.csv"), engine, start_another)


def test_fail_fast_ends_at_a_bad_image_and_resumes_when_it_is_repaired(engine, images, tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(BatchError, match=r"^broken\.png: image: expected a JPEG"):
        run_batch(job(images, out, fail_fast=True), engine)
    assert not out.exists()
    (images / "broken.png").write_bytes((images / "00000.png").read_bytes())
    summary = run_batch(job(images, out, fail_fast=True), engine)
    assert summary.counts.errors == 0
    assert summary.earlier == names(images).index("broken.png")
    assert [row["path"] for row in read_rows(out)] == names(images)


def test_the_shards_of_a_job_are_the_whole_job(engine, images, tmp_path):
    run_batch(job(images, tmp_path / "whole.jsonl"), engine)
    shares = []
    for index in range(3):
        source = Input(str(images), Shard(index, 3))
        run_batch(BatchJob(source, tmp_path / "share.jsonl", top_k=2), engine)
        shares += read_rows(tmp_path / f"share-{index:05}-of-00003.jsonl")
    assert sorted(row["path"] for row in shares) == names(images)
    whole = {row["path"]: row for row in read_rows(tmp_path / "whole.jsonl")}
    for row in shares:
        assert row["labels"] == whole[row["path"]]["labels"]


def test_a_shard_without_inputs_writes_an_empty_table(engine, images, tmp_path):
    counts = []
    for index in range(5):
        out = tmp_path / "few.parquet"
        source = Input(str(images / "0000[0].png"), Shard(index, 5))
        counts.append(run_batch(BatchJob(source, out, top_k=2), engine).counts.images)
        assert len(read_rows(source.shard.name(out))) == counts[-1]
    assert sorted(counts) == [0, 0, 0, 0, 1]


def test_evaluate_where_folders_are_classes(repository, tmp_path):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        truths, found = samples["labels"], samples["logits"].argmax(axis=1)
    folder, out = tmp_path / "images", tmp_path / "out.csv"
    for number, content in enumerate(digit_files(repository)):
        path = folder / str(truths[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "misc").mkdir()
    (folder / "misc" / "x.png").write_bytes(digit_files(repository)[0])
    command = ("batch", folder, "--out", out, "--engine", "local", "--repository", repository)
    result = run_module("convoy.client", *command, "--evaluate")
    assert result.returncode == 0, result.stderr
    accuracy = np.mean(truths == found)
    assert f"accuracy {accuracy:.4f} over {len(truths)} images" in result.stdout
    assert "1 with other labels left out" in result.stdout
    assert "left out: misc (1)" in result.stderr
    summary = json.loads((tmp_path / "out.csv.summary.json").read_text())
    assert summary["accuracy"] == pytest.approx(accuracy)
    for label, share in summary["accuracy_per_class"].items():
        assert share == pytest.approx(np.mean(found[truths == int(label)] == int(label)))
    with Image.open(tmp_path / "out.confusion.png") as plot:
        assert plot.format == "PNG"
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 10
    again = run_module("convoy.client", *command, "--evaluate")
    assert f"accuracy {accuracy:.4f}" in again.stdout


def test_evaluate_without_a_known_label_fails_at_once(repository, images, tmp_path):
    flags = ("--engine", "local", "--repository", repository, "--evaluate")
    result = run_module("convoy.client", "batch", images, "--out", tmp_path / "out.csv", *flags)
    assert result.returncode == 1
    assert result.stderr == (
        "convoy-client: --evaluate: no image has a label that is a class of the model: "
        "folders '', deep; classes 0, 1, 2, 3, 4, …\n"
    )
    assert left_in(tmp_path) == {"images"}  # nothing was classified in vain


@pytest.mark.parametrize(
    ("suffix", "limit_bytes"), [("csv", 50_000), ("jsonl", 50_000), ("parquet", 8_000)]
)
def test_a_full_disk_is_one_line_and_the_job_resumes_when_there_is_room(
    repository, tmp_path, suffix, limit_bytes
):
    """Files may not grow over a limit: the operating system fails the write midway."""
    folder, out = tmp_path / "images", tmp_path / f"out.{suffix}"
    expected = write_images(folder, digit_files(repository), 600)
    command = ("batch", folder, "--out", out, "--engine", "local", "--repository", repository)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    flags = ("--part-size", "100", "--top-k", "10")
    result = run_module("convoy.client", *command, *flags, preexec_fn=small_files)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert "File too large" in result.stderr
    assert "the same command resumes" in result.stderr
    assert not out.exists()
    result = run_module("convoy.client", *command, *flags)
    assert result.returncode == 0, result.stderr
    assert [row["path"] for row in read_rows(out)] == expected


def test_a_folder_that_cannot_be_written(repository, images, tmp_path):
    flags = ("--engine", "local", "--repository", repository)
    for out, message in (
        (tmp_path / "no" / "out.csv", "No such file or directory"),
        (tmp_path / "out.xlsx", "expected a name ending in .csv, .jsonl or .parquet"),
    ):
        result = run_module("convoy.client", "batch", images, "--out", out, *flags)
        assert result.returncode == 1
        assert result.stderr.startswith("convoy-client: --out: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert left_in(tmp_path) == {"images"}


# A signal from outside could come before the first part or after the last.
INTERRUPTED_AT_THE_THIRD_PART = """
import os, signal
from convoy.client.__main__ import main
from convoy.client.batch.parts import PartFolder

append, parts = PartFolder.append, []

def append_and_interrupt(self, rows, counts):
    append(self, rows, counts)
    parts.append(rows)
    if len(parts) == 3:
        os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])

PartFolder.append = append_and_interrupt
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("engine", ["local", "grpc"])
def test_a_signal_is_one_line_and_the_same_command_resumes(
    repository, server, tmp_path, engine, name
):
    folder, out = tmp_path / "images", tmp_path / "out.csv"
    expected = write_images(folder, digit_files(repository), 600)
    command = ["batch", str(folder), "--out", str(out), "--engine", engine, "--part-size", "50"]
    command += ["--repository", str(repository), "--address", server.address]
    interrupted = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_THE_THIRD_PART, *command],
        env={**os.environ, "SIGNAL": name},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert interrupted.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
    word = {"SIGINT": "interrupted", "SIGTERM": "terminated"}[name]
    assert interrupted.stderr == f"convoy-client: {word}; the same command resumes\n"
    again = run_module("convoy.client", *command)
    assert again.returncode == 0, again.stderr
    assert "from earlier runs" in again.stdout
    assert [row["path"] for row in read_rows(out)] == expected
