"""Batch jobs whose inputs and tables are in an object store or on the web; the servers are real."""

import base64
import json
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.client import images as client_images
from convoy.client.batch import (
    BatchError,
    BatchJob,
    Input,
    InputError,
    OutputError,
    PartLimits,
    Shard,
    evaluate_table,
    merge_tables,
    retry_errors,
    run_batch,
)
from convoy.client.urls import UrlFolder
from tests.clients.batches import digit_files, local_engine, read_items, read_rows, write_images
from tests.processes import run_module
from tests.stores import gcs_server, s3_server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

COUNT = 17


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request) -> Iterator[object]:
    """A store with an empty bucket; clients find it by the environment."""
    with {"s3": s3_server, "gs": gcs_server}[request.param]() as server:
        yield server.files


@pytest.fixture
def bucket(store, request) -> str:
    """The URL of an empty folder."""
    return f"{scheme(store)}://bucket/" + re.sub(r"\W", "-", request.node.name)


@pytest.fixture(scope="module")
def engine(repository):
    return local_engine(repository, top_k=2)


@pytest.fixture
def images(repository, tmp_path) -> Path:
    """A folder of digits, one of them broken, and a file that is not an image."""
    folder = tmp_path / "images"
    write_images(folder, digit_files(repository), COUNT - 1)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    return folder


def scheme(files) -> str:
    return "gs" if "gs" in files.protocol else "s3"


def names_in(files, url: str) -> list[str]:
    return UrlFolder(url).names()


def upload(files, source: Path, url: str) -> str:
    files.put(str(source), url, recursive=source.is_dir())
    return url


def make_input(kind: str, folder: Path, images: Path) -> Path:
    """Writes the images in one of the forms of an input."""
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    path = folder / f"input.{kind}"
    match kind:
        case "folder":
            return images
        case "tar" | "tar.gz":
            with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
                for name in names:
                    archive.add(images / name, name)
                hard = tarfile.TarInfo("linked.png")
                hard.type, hard.linkname = tarfile.LNKTYPE, names[0]
                archive.addfile(hard)
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.write(images / name, name)
        case "parquet":
            content = [(images / name).read_bytes() for name in names]
            pq.write_table(pa.table({"image": content, "id": names}), path, row_group_size=5)
        case "npy":
            pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 40, 30, 3), np.uint8)
            np.save(path, pixels)
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip", "parquet", "npy"])
def test_an_input_in_a_store_has_the_items_of_the_same_on_a_disk(
    store, bucket, images, tmp_path, kind
):
    source = make_input(kind, tmp_path, images)
    url = upload(store, source, f"{bucket}/{source.name}")
    works = [tmp_path / "here", tmp_path / "there"]
    for work in works:
        work.mkdir()
    here = read_items(Input(str(source)), works[0])
    there = Input(url).open(works[1])
    for start in (0, 1, COUNT - 1):
        items = list(there.items(start))
        assert [item.key for item in items] == [item.key for item in here[start:]]
        for one, other in zip(items, here[start:], strict=True):
            image = Path(other.image).read_bytes() if isinstance(other.image, str) else other.image
            assert np.array_equal(one.image, image)
    if kind == "folder":
        assert there.left_out == {"not named like an image": 1}


def test_patterns_lists_and_folders_of_tables_in_a_store(store, bucket, images, tmp_path):
    upload(store, images, f"{bucket}/images")
    upload(store, make_input("parquet", tmp_path, images), f"{bucket}/table/part-0.parquet")
    upload(store, make_input("parquet", tmp_path, images), f"{bucket}/table/part-1.parquet")
    store.pipe_file(f"{bucket}/table/_SUCCESS", b"")
    found = [f"{bucket}/images/00000.png", str(images / "broken.png"), f"{bucket}/images/none.png"]
    store.pipe_file(f"{bucket}/list.txt", "".join(f"{name}\n" for name in found).encode())

    def keys(name: str) -> list[str]:
        work = tmp_path / re.sub(r"\W", "", name)
        work.mkdir()
        return [item.key for item in read_items(Input(name), work)]

    assert len(keys(f"{bucket}/images/**/*.png")) == COUNT
    assert keys(f"{bucket}/images/0000[01].png")[0] == found[0]
    assert len(keys(f"{bucket}/table")) == len(keys(f"{bucket}/table/*.parquet")) == 2 * COUNT
    assert len(keys(f"{bucket}/table/part-{{0,1}}.parquet")) == 2 * COUNT
    assert keys(f"{bucket}/list.txt") == found
    (tmp_path / "work").mkdir()
    items = read_items(Input(f"{bucket}/list.txt"), tmp_path / "work")
    assert items[0].image == (images / "00000.png").read_bytes()
    assert items[1].image == found[1]
    assert str(items[2].image) == f"{found[2]}: No such file or directory"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_in_a_store_is_the_table_on_a_disk(store, bucket, engine, images, tmp_path, suffix):
    limits = PartLimits(images=5)
    run_batch(BatchJob(Input(str(images)), tmp_path / f"out.{suffix}", parts=limits), engine)
    url = f"{bucket}/out.{suffix}"
    summary = run_batch(BatchJob(Input(str(images)), url, parts=limits), engine)
    assert (summary.counts.images, summary.counts.errors) == (COUNT, 1)
    assert names_in(store, bucket) == [f"out.{suffix}", f"out.{suffix}.summary.json"]
    store.get_file(url, str(tmp_path / f"copy.{suffix}"))
    assert read_rows(tmp_path / f"copy.{suffix}") == read_rows(tmp_path / f"out.{suffix}")
    # A finished job is not done again; another one does not replace it.
    again = run_batch(BatchJob(Input(str(images)), url, parts=limits), engine)
    assert again.earlier == again.counts.images == COUNT
    with pytest.raises(OutputError, match=f"--out: {url} exists, written by another job"):
        run_batch(BatchJob(Input(str(images)), url, top_k=2), engine)
    run_batch(BatchJob(Input(str(images)), url, top_k=2, overwrite=True), engine)


class Killed(BaseException):
    """The end of a process: nothing it does afterwards reaches the store."""


def test_a_job_that_ends_at_any_request_to_the_store_resumes(
    store, bucket, engine, images, tmp_path, monkeypatch
):
    requests = 0
    last = 0
    ask = UrlFolder._ask

    def count(self, name, request):
        nonlocal requests
        requests += 1
        if last and requests >= last:
            raise Killed
        return ask(self, name, request)

    monkeypatch.setattr(UrlFolder, "_ask", count)

    def run(url: str) -> None:
        nonlocal requests
        requests = 0
        run_batch(BatchJob(Input(str(images)), url, parts=PartLimits(images=9)), engine)

    run(f"{bucket}/whole.jsonl")
    whole, steps = store.cat_file(f"{bucket}/whole.jsonl"), requests
    assert steps > 12
    for step in range(1, steps + 1):
        url = f"{bucket}/{step}.jsonl"
        last = step
        with pytest.raises(Killed):
            run(url)
        if step % 4 == 0:  # killed again as it resumes
            last = 2
            with pytest.raises(Killed):
                run(url)
        last = 0
        run(url)
        assert store.cat_file(url) == whole, step
    expected = sorted(f"{name}.jsonl" for name in ["whole", *range(1, steps + 1)])
    assert [
        name for name in names_in(store, bucket) if not name.endswith("summary.json")
    ] == expected


def test_a_process_whose_table_another_one_writes_ends(store, bucket, engine, images):
    url = f"{bucket}/out.jsonl"
    job = BatchJob(Input(str(images)), url, parts=PartLimits(images=1))
    others = []

    def start_another(progress):
        if progress.images > 2 and not others:
            others.append(run_batch(job, engine))

    with pytest.raises(OutputError, match=f"another process writes {url}"):
        run_batch(job, engine, start_another)
    assert others[0].earlier > 0
    assert store.cat_file(url).count(b"\n") == COUNT
    assert names_in(store, bucket) == ["out.jsonl", "out.jsonl.summary.json"]


def test_another_job_does_not_resume_the_parts_in_a_store(store, bucket, engine, images):
    url = f"{bucket}/out.jsonl"

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(BatchJob(Input(str(images)), url), engine, stop)
    other = BatchJob(Input(str(images)), url, top_k=2)
    with pytest.raises(OutputError, match=f"{url}.parts: holds an unfinished job that differs"):
        run_batch(other, engine)
    summary = run_batch(BatchJob(Input(str(images)), url), engine)
    assert summary.earlier > 0
    with pytest.raises(KeyboardInterrupt):
        run_batch(BatchJob(Input(str(images)), url, overwrite=True), engine, stop)
    summary = run_batch(BatchJob(other.input, url, top_k=2, overwrite=True), engine)
    assert (summary.earlier, summary.counts.images) == (0, COUNT)


def test_shards_in_a_store_are_merged_evaluated_and_repaired(
    store, bucket, repository, engine, images, tmp_path
):
    upload(store, images, f"{bucket}/images")
    jobs = [
        BatchJob(Input(f"{bucket}/images", Shard(index, 2)), f"{bucket}/share.jsonl")
        for index in range(2)
    ]
    for job in jobs:
        run_batch(job, engine)
    store.pipe_file(f"{bucket}/images/broken.png", digit_files(repository)[0])
    repaired = [retry_errors(job, engine, lambda _: None, pytest.fail) for job in jobs]
    assert sum(summary.counts.errors for summary in repaired) == 0
    whole = f"{bucket}/whole.parquet"
    with pytest.raises(OutputError, match=r"expected the shards 0 to 1, got \[0\]"):
        merge_tables([jobs[0].name], whole, overwrite=False)
    summary = merge_tables([job.name for job in jobs], whole, overwrite=False)
    assert (summary.counts.images, summary.counts.errors) == (COUNT, 0)
    store.get_file(whole, str(tmp_path / "whole.parquet"))
    assert len(read_rows(tmp_path / "whole.parquet")) == COUNT
    assert json.loads(store.cat_file(f"{whole}.summary.json"))["images"] == COUNT
    with pytest.raises(InputError, match=f"{whole}: no image has a label that is a class"):
        evaluate_table(whole, "", ["x"])
    with pytest.raises(OutputError, match=f"{whole} exists"):
        merge_tables([job.name for job in jobs], whole, overwrite=False)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("STORE://missing/images", "OUT", "STORE://missing/images: "),
        (
            "STORE://bucket/missing.tar",
            "OUT",
            "STORE://bucket/missing.tar: No such file or directory",
        ),
        ("STORE://bucket/missing/", "OUT", "STORE://bucket/missing/: holds no image"),
        ("nothing://bucket/images", "OUT", "nothing://bucket/images: Protocol not known: nothing"),
        ("http://127.0.0.1:1/list.txt", "OUT", "http://127.0.0.1:1/list.txt: "),
        ("IMAGES", "STORE://missing/out.csv", "--out: STORE://missing/out.csv: "),
        ("IMAGES", "STORE://bucket/out.xlsx", "--out: expected a name ending in"),
        ("IMAGES", "https://127.0.0.1:1/out.csv", "--out: https://127.0.0.1:1/out.csv: "),
    ],
)
def test_a_failure_names_the_url(store, engine, images, tmp_path, source, out, message):
    source = source.replace("IMAGES", str(images)).replace("STORE", scheme(store))
    out, message = (text.replace("STORE", scheme(store)) for text in (out, message))
    with pytest.raises(BatchError) as raised:
        run_batch(BatchJob(Input(source), out.replace("OUT", str(tmp_path / "out.csv"))), engine)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.csv").exists()


def test_a_job_in_a_store_by_the_command_line(store, bucket, repository, images):
    flags = ("--engine", "local", "--repository", repository, "--max-errors", "1")
    for shard in ("0/2", "1/2"):
        command = ("batch", images, "--out", f"{bucket}/out.csv", "--shard", shard)
        result = run_module("convoy.client", *command, *flags)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{bucket}/out-0000{shard[0]}-of-00002.csv: ")
    missing = f"{scheme(store)}://missing/o.csv"
    failed = run_module("convoy.client", "batch", images, "--out", missing, *flags)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"convoy-client: --out: {missing}: ")
    assert failed.stderr.count("\n") == 1, failed.stderr


class RangeHandler(SimpleHTTPRequestHandler):
    """Answers requests for ranges, as web servers do and Python's own does not."""

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, *_):
        pass


class PrivateHandler(RangeHandler):
    """Answers who has the password and a signature."""

    def do_GET(self):
        password = base64.b64decode(self.headers.get("Authorization", "")[len("Basic ") :])
        if password != b"someone:pass-word" or not self.path.endswith("?sig=a1b2"):
            self.send_error(403)
        else:
            super().do_GET()


class EndlessHandler(BaseHTTPRequestHandler):
    """Sends a file whose end never comes."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(10_000))
        except ConnectionError:
            self.server.left.set()

    def log_message(self, *_):
        pass


@contextmanager
def web_server(handler) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(params=[RangeHandler, SimpleHTTPRequestHandler], ids=["ranges", "plain"])
def web(request, tmp_path) -> Iterator[tuple[str, bool]]:
    """A web server of `tmp_path`: its URL, and whether it answers requests for ranges."""
    with web_server(partial(request.param, directory=tmp_path)) as server:
        yield f"http://127.0.0.1:{server.server_port}", request.param is RangeHandler


def test_inputs_on_the_web(web, engine, images, tmp_path):
    url, answers_ranges = web
    names = [f"{url}/images/00000.png", f"{url}/images/missing.png"]
    (tmp_path / "list.txt").write_text("".join(f"{name}?token=1\n" for name in names))
    summary = run_batch(BatchJob(Input(f"{url}/list.txt"), tmp_path / "list.jsonl"), engine)
    assert (summary.counts.images, summary.counts.errors) == (2, 1)
    rows = read_rows(tmp_path / "list.jsonl")
    assert [row["path"] for row in rows] == names
    assert rows[1]["error"] == f"{names[1]}: No such file or directory"
    # Larger than what is read at once, so that a server without ranges cannot serve it.
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for path in sorted(images.rglob("*.png")):
            archive.add(path, path.name)
        (tmp_path / "filler").write_bytes(bytes(6 * 1024 * 1024))
        archive.add(tmp_path / "filler", "filler.bin")
    job = BatchJob(Input(f"{url}/images.tar?token=2"), tmp_path / "tar.jsonl")
    if answers_ranges:
        assert run_batch(job, engine).counts.images == COUNT
    else:
        with pytest.raises(InputError, match=r"images\.tar.*(range|more bytes)"):
            run_batch(job, engine)


def test_passwords_and_signatures_of_urls_are_not_written(engine, images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with web_server(partial(PrivateHandler, directory=tmp_path)) as server:
        host = f"127.0.0.1:{server.server_port}"
        private = f"http://someone:pass-word@{host}"
        files = [f"{private}/images/{name}.png?sig=a1b2" for name in ("00000", "missing", "broken")]
        (tmp_path / "list.txt").write_text("\n".join(files))
        inputs = (f"{private}/list.txt?sig=a1b2", f"{private}/missing.tar?sig=a1b2")
        summary = run_batch(BatchJob(Input(inputs), out / "table.jsonl"), engine)
        other = tuple(name.replace("a1b2", "c3d4") for name in inputs)
        with pytest.raises(OutputError, match="written by another job"):
            run_batch(BatchJob(Input(other), out / "table.jsonl"), engine)
        with pytest.raises(InputError) as raised:
            run_batch(BatchJob(Input(inputs[1]), out / "none.jsonl"), engine)
    assert str(raised.value) == f"http://{host}/missing.tar: No such file or directory"
    rows = read_rows(out / "table.jsonl")
    paths = [f"http://{host}/{name}" for name in ("images/00000.png", "images/missing.png")]
    assert [row["path"] for row in rows[:2]] == paths
    assert rows[1]["error"] == f"{paths[1]}: No such file or directory"
    assert (summary.counts.images, summary.counts.errors) == (4, 3)
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    shown = written.decode() + repr(summary)
    assert not re.search("someone|pass-word|a1b2", shown)


def test_an_image_without_an_end_is_an_error(engine, images, tmp_path, monkeypatch):
    monkeypatch.setattr(client_images, "MAX_FILE_BYTES", 100_000)
    with web_server(EndlessHandler) as server:
        server.left = threading.Event()
        url = f"http://127.0.0.1:{server.server_port}/endless.png"
        (tmp_path / "list.txt").write_text(f"{url}\n{images / '00000.png'}\n")
        run_batch(BatchJob(Input(str(tmp_path / "list.txt")), tmp_path / "out.jsonl"), engine)
        assert server.left.wait(30)
    rows = read_rows(tmp_path / "out.jsonl")
    errors = [row["error"] for row in rows]
    assert errors == [f"{url}: expected at most 100000 bytes, got more", None]


def test_objects_above_the_limit_and_empty_ones_are_errors(
    store, bucket, engine, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(client_images, "MAX_FILE_BYTES", 10_000)
    upload(store, images, f"{bucket}/images")
    store.pipe_file(f"{bucket}/images/large.png", bytes(10_001))
    store.pipe_file(f"{bucket}/images/empty.png", b"")
    run_batch(BatchJob(Input(f"{bucket}/images"), tmp_path / "out.jsonl"), engine)
    errors = {row["path"]: row["error"] for row in read_rows(tmp_path / "out.jsonl")}
    assert errors["00000.png"] is None
    expected = f"{bucket}/images/large.png: expected at most 10000 bytes, got more"
    assert errors["large.png"] == expected
    assert errors["empty.png"].endswith("got 0 other bytes")
