"""What a job reports: counts that add up, error limits, versions, accuracy, merged shards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.client.batch import (
    BatchError,
    BatchJob,
    ErrorLimit,
    Input,
    InputError,
    OutputError,
    PartLimits,
    Shard,
    merge_tables,
    retry_errors,
    run_batch,
)
from convoy.client.batch.counts import Counts, reason_of
from convoy.client.batch.items import Row
from convoy.client.batch.tables import Layout, layout_of, table_for
from tests.clients.batches import digit_files, local_engine, read_rows, write_images
from tests.processes import run_module

FORMATS = ("csv", "jsonl", "parquet")


@pytest.fixture(scope="module")
def engine(repository):
    return local_engine(repository, top_k=2)


@pytest.fixture
def images(repository, tmp_path) -> Path:
    """Thirty digits, two of them broken, and files that are not images."""
    folder = tmp_path / "images"
    write_images(folder, digit_files(repository), 28)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes(digit_files(repository)[0][:60])
    (folder / "notes.txt").write_text("no image")
    return folder


def batch(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    flags = ("--engine", "local", "--repository", repository)
    return run_module("convoy.client", "batch", *arguments, *flags)


def summary_of(out: Path) -> dict:
    return json.loads(Path(f"{out}.summary.json").read_text())


def test_a_summary_adds_up_and_a_line_says_what_failed(repository, images, tmp_path):
    out = tmp_path / "out.csv"
    result = batch(repository, images, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "30 images, 2 errors" in result.stdout
    assert "1 left out: 1 not named like an image" in result.stdout
    assert result.stderr.startswith(
        "convoy-client: 2 of 30 images failed; the most common reason, 1 "
    )
    assert result.stderr.count("\n") == 1
    summary = summary_of(out)
    assert summary["images"] == summary["classified"] + summary["errors"] == 30
    assert sum(summary["errors_by_reason"].values()) == summary["errors"]
    assert sum(summary["classes"].values()) == summary["classified"]
    assert sum(summary["versions"].values()) == summary["classified"]
    assert summary["left_out"] == {"not named like an image": 1}
    assert summary["first_failed"] == ["broken.png", "cut.png"]
    # A finished job says the same when it is run again.
    again = batch(repository, images, "--out", out)
    assert (again.returncode, again.stderr) == (0, result.stderr)


@pytest.mark.parametrize(
    ("limit", "status"),
    [("2", 0), ("1", 3), ("0", 3), ("7%", 0), ("0.06", 3), ("6.6%", 3), ("100%", 0), ("1.0", 0)],
)
def test_too_many_errors_are_an_exit_code(repository, images, tmp_path, limit, status):
    result = batch(repository, images, "--out", tmp_path / "out.csv", "--max-errors", limit)
    assert result.returncode == status, result.stderr
    assert len(read_rows(tmp_path / "out.csv")) == 30


def test_a_job_of_nothing_but_errors(repository, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    result = batch(repository, tmp_path, "--out", tmp_path / "out.csv")
    assert result.returncode == 3
    assert "5 of 5 images failed; the most common reason, 5 times: image: expected" in result.stderr


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "101%", "10 %", "0.1.1", "nan", "½"])
def test_an_invalid_error_limit_is_rejected(text):
    with pytest.raises(BatchError, match="--max-errors: expected a number, a share"):
        ErrorLimit.parse(text)


def test_a_whole_input_that_failed_is_an_exit_code(repository, images, tmp_path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"no tar at all")
    result = batch(repository, images, bad, "--out", tmp_path / "out.csv", "--max-errors", "100%")
    assert result.returncode == 3
    assert f"input {bad} failed: after 0 images" in result.stderr
    rows = read_rows(tmp_path / "out.csv")
    assert len(rows) == 31
    assert rows[-1]["path"] == str(bad)
    assert list(summary_of(tmp_path / "out.csv")["failed_inputs"]) == [str(bad)]


def test_a_reason_leaves_out_what_differs():
    one, other = "/a/1.png: No such file or directory", "/b/2.png: No such file or directory"
    assert reason_of("1.png", one) == reason_of("2.png", other) == "No such file or directory"
    assert reason_of("k", "expected 'a', got 7 bytes") == "expected '…', got N bytes"


def test_reasons_are_bounded():
    counts = Counts()
    words = [f"reason {'x' * number}" for number in range(200)]
    counts.add(Row(str(number), error=word) for number, word in enumerate(words))
    assert sum(counts.reasons.values()) == counts.errors == 200
    assert len(counts.reasons) <= 51
    assert len(counts.failed) == 20


@pytest.mark.parametrize("suffix", FORMATS)
def test_errors_are_classified_again(repository, images, engine, tmp_path, suffix):
    out = tmp_path / f"out.{suffix}"
    job = BatchJob(Input(str(images)), out, top_k=2)
    before = run_batch(job, engine)
    rows = read_rows(out)
    (images / "broken.png").write_bytes(digit_files(repository)[3])
    (images / "another.png").write_bytes(digit_files(repository)[4])  # not in the table
    seen = []
    summary = retry_errors(job, engine, seen.append, warn=pytest.fail)
    assert seen[-1].total == 2
    assert (before.counts.errors, summary.counts.errors, summary.counts.images) == (2, 1, 30)
    after = read_rows(out)
    assert [row["path"] for row in after] == [row["path"] for row in rows]
    for old, new in zip(rows, after, strict=True):
        if old["path"] == "broken.png":
            assert new["label"]
            assert not new["error"]
        else:
            assert new == old
    again = run_batch(job, engine)
    assert again.counts == summary.counts
    assert {path.name for path in tmp_path.iterdir()} == {
        "images",
        out.name,
        f"{out.name}.summary.json",
    }


def test_retrying_by_the_command_line(repository, images, tmp_path):
    out = tmp_path / "out.csv"
    assert batch(repository, images, "--out", out, "--retry-errors").returncode == 0
    shutil.copy(images / "00000.png", images / "broken.png")
    (images / "cut.png").unlink()
    result = batch(repository, images, "--out", out, "--retry-errors")
    assert result.returncode == 0, result.stderr
    assert "1 images with errors are no longer in the input" in result.stderr
    assert "1 of 30 images failed" in result.stderr
    assert len(read_rows(out)) == 30
    other = batch(repository, images, "--out", out, "--retry-errors", "--top-k", "3")
    assert other.returncode == 1
    assert "written by another job" in other.stderr


def test_a_retry_of_repeated_paths_takes_the_right_ones(repository, engine, tmp_path):
    """A path that is listed twice fails once: only that row is replaced."""
    good, missing = tmp_path / "good.png", tmp_path / "missing.png"
    good.write_bytes(digit_files(repository)[0])
    listed = tmp_path / "list.txt"
    listed.write_text(f"{good}\n{missing}\n{good}\n{missing}\n")
    job = BatchJob(Input(str(listed)), tmp_path / "out.jsonl", top_k=2)
    assert run_batch(job, engine).counts.errors == 2
    missing.write_bytes(digit_files(repository)[1])
    assert retry_errors(job, engine, lambda _: None, warn=pytest.fail).counts.errors == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["path"] for row in rows] == [str(good), str(missing)] * 2
    assert rows[0] == rows[2]
    assert rows[1] == rows[3]


def test_an_interrupted_retry_resumes(repository, images, engine, tmp_path):
    out = tmp_path / "out.jsonl"
    limits = PartLimits(images=1)
    job = BatchJob(Input(str(images)), out, top_k=2, parts=limits)
    run_batch(job, engine)
    rows = read_rows(out)
    for name in ("broken.png", "cut.png"):
        shutil.copy(images / "00000.png", images / name)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry_errors(job, engine, stop, warn=pytest.fail)
    assert read_rows(out) == rows
    with pytest.raises(OutputError, match="retry"):
        run_batch(job, engine)
    assert retry_errors(job, engine, lambda _: None, warn=pytest.fail).counts.errors == 0
    assert [row["path"] for row in read_rows(out)] == [row["path"] for row in rows]


@pytest.fixture
def labeled(repository, tmp_path) -> Path:
    """Digits in a folder a class, one of them broken; returns the folder."""
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        truths = samples["labels"]
    folder = tmp_path / "labeled"
    for number, content in enumerate(digit_files(repository)):
        path = folder / str(truths[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "3" / "broken.png").parent.mkdir(exist_ok=True)
    (folder / "3" / "broken.png").write_bytes(b"no image")
    return folder


def hits(repository: Path) -> tuple[int, int]:
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        found = samples["logits"].argmax(axis=1)
        return int((found == samples["labels"]).sum()), len(found)


def test_a_broken_image_counts_as_wrong_and_is_named(repository, labeled, tmp_path):
    out = tmp_path / "out.csv"
    result = batch(repository, labeled, "--out", out, "--evaluate")
    right, count = hits(repository)
    assert f"accuracy {right / (count + 1):.4f} over {count + 1} images" in result.stdout
    assert f"{right / count:.4f} without the 1 that failed" in result.stdout
    assert "failed: 3/broken.png" in result.stdout
    summary = summary_of(out)
    assert summary["accuracy"] == pytest.approx(right / (count + 1))
    assert summary["accuracy_of_classified"] == pytest.approx(right / count)
    assert sum(summary["evaluated_images_per_class"].values()) == count + 1
    rows = read_rows(out)
    assert all(row["true_label"] == row["path"].partition("/")[0] for row in rows)


def test_a_label_column(repository, tmp_path):
    files = digit_files(repository)
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        truths = [int(label) for label in samples["labels"]]
    source = tmp_path / "x.parquet"
    table = {"image": pa.array(files, pa.binary()), "digit": truths, "id": range(100, 116)}
    pq.write_table(pa.table(table), source)
    flags = ("--evaluate", "--label-column", "digit", "--pass-columns", "id,digit")
    right, count = hits(repository)
    for suffix in FORMATS:
        out = tmp_path / f"out.{suffix}"
        result = batch(repository, source, "--out", out, *flags)
        assert result.returncode == 0, result.stderr
        assert f"accuracy {right / count:.4f} over {count} images" in result.stdout
        rows = read_rows(out)
        assert [int(row["id"]) for row in rows] == list(range(100, 116))
        assert [row["true_label"] for row in rows] == [str(label) for label in truths]
        again = run_module("convoy.client", "evaluate", out)
        assert f"accuracy {right / count:.4f} over {count} images" in again.stdout, again.stderr
        named = run_module("convoy.client", "evaluate", out, "--label-column", "digit")
        assert f"accuracy {right / count:.4f} over {count} images" in named.stdout
    wrong = batch(
        repository, source, "--out", tmp_path / "w.csv", "--evaluate", "--label-column", "x"
    )
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "expected columns of image, digit, id, got 'x'" in wrong.stderr
    taken = batch(repository, source, "--out", tmp_path / "w.csv", "--pass-columns", "label")
    assert "the table has a column 'label' of its own" in taken.stderr


def test_a_finished_table_is_evaluated(repository, labeled, tmp_path):
    out = tmp_path / "out.parquet"
    batch(repository, labeled, "--out", out)
    plot = tmp_path / "matrix.png"
    result = run_module("convoy.client", "evaluate", out, "--plot", plot)
    right, count = hits(repository)
    assert f"accuracy {right / (count + 1):.4f} over {count + 1} images" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    other = run_module("convoy.client", "evaluate", tmp_path / "x.csv")
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert "expected a table of a batch job" in other.stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_shards_are_merged(repository, images, engine, tmp_path, suffix):
    whole = run_batch(BatchJob(Input(str(images)), tmp_path / f"whole.{suffix}", top_k=2), engine)
    out, shards = tmp_path / f"out.{suffix}", []
    for index in range(3):
        job = BatchJob(Input(str(images), Shard(index, 3)), out, top_k=2)
        run_batch(job, engine)
        shards.append(job.table)
    merged = merge_tables(shards[::-1], out, overwrite=False)
    assert merged.counts.images == whole.counts.images
    assert merged.counts.classes == whole.counts.classes
    assert merged.inputs.left_out == whole.inputs.left_out
    rows = [read_rows(path) for path in (tmp_path / f"whole.{suffix}", out)]
    one, other = (sorted(each, key=lambda row: row["path"]) for each in rows)
    assert one == other
    with pytest.raises(OutputError, match="use --overwrite"):
        merge_tables(shards, out, overwrite=False)
    with pytest.raises(OutputError, match=r"expected the shards 0 to 2, got \[0, 2\]"):
        merge_tables([shards[0], shards[2]], out, overwrite=True)
    Path(f"{shards[1]}.summary.json").unlink()
    result = run_module("convoy.client", "merge", *shards, "--out", out, "--overwrite")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "not finished" in result.stderr


def test_rows_to_stdout(repository, images, tmp_path):
    result = batch(repository, images, "--out", "-", "--top-k", "2")
    assert result.returncode == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    batch(repository, images, "--out", tmp_path / "out.jsonl", "--top-k", "2")
    assert rows == read_rows(tmp_path / "out.jsonl")
    assert "30 images, 2 errors" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "images",
        "out.jsonl",
        "out.jsonl.summary.json",
    }


def test_a_closed_stdout_ends_the_job(repository, images):
    command = [sys.executable, "-m", "convoy.client", "batch", str(images), "--out", "-"]
    command += ["--engine", "local", "--repository", str(repository), "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read().decode()
    assert process.returncode != 0
    assert "Traceback" not in stderr
    assert stderr.count("\n") <= 1, stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_is_read_as_it_was_written(tmp_path, suffix):
    rows = [
        Row("a", ("x", "y"), (1, 0), (0.75, 0.25), "m", 3, None, "x", {"n": "1"}),
        Row("b\udce9\n", error="line one\nline two \udce9", true_label="y", columns={"n": "2"}),
        Row("c", ("y",), (0,), (1.0,), "m", 3, None, "y", {"n": "3"}),
    ]
    layout = Layout(2, True, ("n",))
    path, part = tmp_path / f"t.{suffix}", tmp_path / f"p.{suffix}"
    table = table_for(path, layout)
    table.write(rows, part)
    table.merge([part], path)
    assert list(table.read_part(part)) == list(table.read(path)) == rows
    assert rows[1].error == "line one line two \\xe9"
    found = layout_of(path)
    assert (found.evaluate, found.columns) == (True, ("n",))


def test_parquet_has_statistics_and_columns_of_changing_types(tmp_path):
    layout = Layout(1, columns=("n",))
    table = table_for(tmp_path / "t.parquet", layout)
    parts = []
    for number, value in enumerate((None, 5, None)):
        parts.append(tmp_path / f"{number}.parquet")
        table.write([Row(str(number), error="e", columns={"n": value})], parts[-1])
    table.merge(parts, tmp_path / "t.parquet")
    assert [row["n"] for row in read_rows(tmp_path / "t.parquet")] == [None, 5, None]
    group = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0)
    assert group.column(0).statistics.min == "0"


def test_several_versions_are_reported():
    counts = Counts()
    counts.add([Row("a", ("x",), (0,), (1.0,), "m", version) for version in (1, 1, 2)])
    assert counts.versions == {"m/1": 2, "m/2": 1}


def test_an_input_that_shrinks_meanwhile_is_noticed(engine, tmp_path):
    class Shrinking:
        total, left_out, failures = 3, {}, {}

        def items(self, start):
            return iter(())

        keys = items

    class Source(Input):
        def open(self, folder):
            return Shrinking()

    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="has 3 images, but 0 were classified"):
        run_batch(BatchJob(Source(str(tmp_path / "in")), tmp_path / "out.csv"), engine)
