"""Repositories in a store: a real S3 server and a real web server, real loading."""

import json
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry

from convoy.server.errors import RepositoryError, UnreadableError, VerificationError
from convoy.server.metrics.mirror import MirrorMetrics
from convoy.server.models import copies, store
from convoy.server.models.canary import Verdict, VerdictRecords
from convoy.server.models.mirror import MirroredRepository
from convoy.server.models.store import ObjectStore
from tests.server.conftest import seal
from tests.server.models.test_manager import Live, damage
from tests.stores import s3_server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MIB = 2**20


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


class Mirror:
    """A mirror of what `publish` wrote and `upload` put into the store."""

    def __init__(self, tmp_path, url: str) -> None:
        self.models = tmp_path / "models"
        self.cache = tmp_path / "cache"
        self.url = url
        self.errors: list[str] = []
        self.repository: MirroredRepository
        self.registry: CollectorRegistry

    def open(self, limit_bytes: int = 100 * MIB, **timeouts: float) -> MirroredRepository:
        """Opens the mirror as the next process does."""
        if hasattr(self, "repository"):
            self.repository.close()
        self.registry = CollectorRegistry()
        self.repository = MirroredRepository(
            ObjectStore(self.url, **timeouts),
            self.cache,
            limit_bytes,
            MirrorMetrics(self.registry),
            lambda error: self.errors.append(error.code),
        )
        return self.repository

    def versions(self) -> dict[str, tuple[int, ...]]:
        return {model.name: model.versions for model in self.repository.models()}

    def folder(self, version: int, name: str = "colors"):
        return self.repository.version_folder(name, version)

    def value(self, metric: str) -> float:
        return self.registry.get_sample_value(f"convoy_mirror_{metric}")

    def copied(self) -> set[str]:
        return {f"{path.parent.name}/{path.name}" for path in self.cache.glob("*/*/*.onnx")}


@pytest.fixture
def mirror(s3, tmp_path, request):
    folder = "s3://bucket/" + re.sub(r"\W", "-", request.node.name)
    mirror = Mirror(tmp_path, folder)
    mirror.open()
    yield mirror
    mirror.repository.close()


@pytest.fixture
def upload(s3, mirror):
    """Copies versions to the store as any tool does, the manifest last."""

    def put(*folders) -> None:
        for folder in folders:
            url = f"{mirror.url}/{folder.parent.name}/{folder.name}"
            for file in sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json"):
                s3.files.put_file(str(file), f"{url}/{file.name}")

    return put


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the store was asked."""
    requests: list[str] = []
    ask = ObjectStore._ask

    def note(self, what, timeout_s, request):
        requests.append(what.removeprefix("cannot "))
        return ask(self, what, timeout_s, request)

    monkeypatch.setattr(ObjectStore, "_ask", note)
    return requests


@pytest.mark.slow
async def test_versions_in_a_store_are_served_and_followed(mirror, publish, upload, s3):
    live = Live(mirror.cache, repository=mirror.repository)
    await live.manager.start()
    assert live.served == [], "it waits for its first model"
    upload(publish(1))
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    # Without its manifest a version is not there yet.
    folder = publish(2)
    (folder / "manifest.json").rename(folder / "later")
    upload(folder)
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    s3.files.put_file(str(folder / "later"), f"{mirror.url}/colors/2/manifest.json")
    await live.manager.refresh()
    assert live.served == [("colors", 2)]
    policy = {"schema_version": 1, "version": 1}
    s3.files.pipe_file(f"{mirror.url}/colors/policy.json", json.dumps(policy).encode())
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    s3.files.rm_file(f"{mirror.url}/colors/policy.json")
    s3.files.rm(f"{mirror.url}/colors/2", recursive=True)
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    assert not (mirror.cache / "colors" / "2").exists()
    await live.manager.close()


def test_a_scan_lists_and_reads_nothing_again(mirror, publish, upload, asked):
    upload(publish(1), publish(2))
    assert mirror.versions() == {"colors": (1, 2)}
    assert mirror.copied() == set(), "only what is loaded is copied"
    mirror.repository.fetch(mirror.folder(2))
    assert mirror.copied() == {"2/model.onnx"}
    asked.clear()
    mirror.versions()
    mirror.repository.fetch(mirror.folder(2))
    assert asked == [f"list {mirror.url}"]
    upload(publish(3))
    asked.clear()
    mirror.versions()
    # The small file of the new version, and none of the others.
    assert asked == [f"list {mirror.url}", f"read {mirror.url}"]
    assert mirror.value("last_listing_timestamp_seconds") > 0


def test_a_restart_fetches_nothing_again_and_needs_no_store(mirror, publish, upload, s3, asked):
    upload(publish(1), publish(2))
    mirror.versions()
    mirror.repository.fetch(mirror.folder(2))
    mirror.open()
    asked.clear()
    assert mirror.versions() == {"colors": (1, 2)}
    mirror.repository.fetch(mirror.folder(2))
    assert asked == [f"list {mirror.url}"]
    assert mirror.value("fetched_bytes_total") == 0
    mirror.open()
    s3.stop()
    try:
        assert mirror.versions() == {"colors": (1, 2)}
        mirror.repository.fetch(mirror.folder(2))
        with pytest.raises(UnreadableError, match="cannot read"):
            mirror.repository.fetch(mirror.folder(1))
        assert len(mirror.errors) == 1
    finally:
        s3.start()
    mirror.repository.fetch(mirror.folder(1))


async def test_the_server_serves_while_the_store_is_away(mirror, publish, upload, s3, tmp_path):
    empty = Mirror(tmp_path / "other", mirror.url)
    empty.open()
    upload(publish(1), publish(2, spoil=damage), publish(3))
    mirror.versions()
    mirror.repository.fetch(mirror.folder(1))
    s3.stop()
    try:
        # Version 3 was never copied, and 2 neither: they are loaded when the store is back.
        live = Live(mirror.cache, repository=mirror.open())
        await live.manager.start()
        assert live.served == [("colors", 1)]
        with pytest.raises(UnreadableError, match=r"cannot list s3://.*Could not connect"):
            empty.versions()
        empty.repository.close()
    finally:
        s3.start()
    await live.manager.load("colors")
    assert live.served == [("colors", 3)]
    await live.manager.close()


async def test_a_bad_version_is_rejected_until_its_files_change(mirror, publish, upload, asked):
    upload(publish(1), publish(2, spoil=damage))
    live = Live(mirror.cache, repository=mirror.repository)
    await live.manager.start()
    assert live.served == [("colors", 1)]
    assert live.rejections("files") == 1
    asked.clear()
    await live.manager.refresh()
    assert asked == [f"list {mirror.url}"]
    shutil.copy(mirror.models / "colors/1/model.onnx", mirror.models / "colors/2/model.onnx")
    upload(mirror.models / "colors/2")
    await live.manager.refresh()
    assert live.served == [("colors", 2)]
    await live.manager.close()


def test_a_damaged_copy_is_fetched_again(mirror, publish, upload):
    upload(publish(1))
    mirror.versions()
    mirror.repository.fetch(mirror.folder(1))
    damage(mirror.folder(1))
    mirror.open()
    mirror.versions()
    original = (mirror.models / "colors/1/model.onnx").read_bytes()
    assert mirror.repository.read(mirror.folder(1), lambda f: (f / "model.onnx").read_bytes()) == (
        original
    )
    assert mirror.value("damaged_files_total") == 1
    assert mirror.value("fetched_bytes_total") == len(original)


@pytest.mark.parametrize("spoilt", [False, True])
def test_an_interrupted_copy_is_completed(mirror, publish, upload, monkeypatch, spoilt):
    monkeypatch.setattr(copies, "_BLOCK_BYTES", 100)
    upload(publish(1))
    mirror.versions()
    read = ObjectStore.read_block
    blocks = 0

    def fail_at_the_third(self, path, offset, size_bytes):
        nonlocal blocks
        blocks += 1
        if blocks == 3:
            raise UnreadableError("away", "ETIMEDOUT")
        return read(self, path, offset, size_bytes)

    monkeypatch.setattr(ObjectStore, "read_block", fail_at_the_third)
    with pytest.raises(UnreadableError):
        mirror.repository.fetch(mirror.folder(1))
    (partial,) = mirror.folder(1).glob(".*.partial")
    assert partial.stat().st_size == 200
    if spoilt:  # as a crash of the machine may leave it
        partial.write_bytes(b"\0" * 200)
    mirror.open()
    mirror.versions()
    mirror.repository.fetch(mirror.folder(1))
    files = {path.name: path.stat().st_size for path in (mirror.models / "colors/1").iterdir()}
    size_bytes = files["model.onnx"] + files["samples.npz"]
    expected = size_bytes - 200 + (files["model.onnx"] if spoilt else 0)
    assert mirror.value("fetched_bytes_total") == expected
    assert mirror.value("copies_bytes") == size_bytes
    assert not list(mirror.folder(1).glob(".*.partial"))


def test_copies_are_bounded_and_the_least_recently_loaded_go_first(mirror, publish, upload):
    folders = [publish(version) for version in (1, 2, 3, 4)]
    upload(*folders)
    size_bytes = sum((folders[0] / name).stat().st_size for name in ("model.onnx", "samples.npz"))
    repository = mirror.open(limit_bytes=int(2.5 * size_bytes))
    mirror.versions()

    def reject(folder) -> None:
        raise RepositoryError("rejected")

    repository.read(mirror.folder(1), lambda folder: None)
    with pytest.raises(RepositoryError, match="rejected"):
        repository.read(mirror.folder(2), reject)
    repository.read(mirror.folder(3), lambda folder: None)
    assert mirror.copied() == {"1/model.onnx", "3/model.onnx"}, "the rejected one first"
    repository.read(mirror.folder(4), lambda folder: None)
    assert mirror.copied() == {"3/model.onnx", "4/model.onnx"}
    assert mirror.value("evicted_versions_total") == 2
    assert mirror.value("copies_bytes") <= 2.5 * size_bytes

    def fetch_another(folder) -> None:
        """What is being loaded stays."""
        with pytest.raises(UnreadableError, match="version 1: --cache-mib"):
            repository.fetch(mirror.folder(1))

    repository.read(mirror.folder(3), lambda _: repository.read(mirror.folder(4), fetch_another))
    assert mirror.copied() == {"3/model.onnx", "4/model.onnx"}
    repository = mirror.open(limit_bytes=size_bytes - 1)
    with pytest.raises(RepositoryError, match=r"version 1: --cache-mib: expected at least 0\.0"):
        repository.fetch(mirror.folder(1))


def test_a_version_that_is_being_copied_keeps_its_room(mirror, publish, upload, monkeypatch):
    folders = [publish(version) for version in (1, 2)]
    upload(*folders)
    size_bytes = sum((folders[0] / name).stat().st_size for name in ("model.onnx", "samples.npz"))
    repository = mirror.open(limit_bytes=int(1.5 * size_bytes))
    mirror.versions()
    read_block, begun, end = ObjectStore.read_block, threading.Event(), threading.Event()

    def wait_once(self, *arguments):
        if not begun.is_set():
            begun.set()
            assert end.wait(60)
        return read_block(self, *arguments)

    monkeypatch.setattr(ObjectStore, "read_block", wait_once)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(repository.fetch, mirror.folder(1))
        assert begun.wait(60)
        with pytest.raises(UnreadableError, match="version 2: --cache-mib"):
            repository.fetch(mirror.folder(2))
        end.set()
        first.result()
    repository.fetch(mirror.folder(2))
    assert mirror.copied() == {"2/model.onnx"}


async def test_a_manifest_that_cannot_be_read_affects_no_other_model(
    mirror, publish, upload, monkeypatch
):
    import s3fs

    upload(publish(1), publish(1, name="shapes"))
    live = Live(mirror.cache, repository=mirror.repository)
    await live.manager.start()
    assert sorted(live.served) == [("colors", 1), ("shapes", 1)]
    upload(publish(2), publish(2, name="shapes"))
    call = s3fs.S3FileSystem._call_s3

    async def deny(self, method, *arguments, **options):
        if method == "get_object" and "/shapes/2/" in options["Key"]:
            raise PermissionError("Access Denied")
        return await call(self, method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", deny)
        await live.manager.refresh()
        assert sorted(live.served) == [("colors", 2), ("shapes", 1)]
        assert live.value("convoy_repository_errors_total", model="shapes", error="EACCES") == 1
    await live.manager.refresh()
    assert sorted(live.served) == [("colors", 2), ("shapes", 2)]
    await live.manager.close()


def test_only_reading_requests_are_sent(mirror, publish, upload, monkeypatch):
    """So credentials that only read suffice."""
    import s3fs

    upload(publish(1))
    calls = []
    call = s3fs.S3FileSystem._call_s3

    async def note(self, method, *arguments, **options):
        calls.append(method)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", note)
    mirror.versions()
    mirror.repository.fetch(mirror.folder(1))
    mirror.versions()
    assert "get_object" in calls
    assert set(calls) <= {"list_objects_v2", "get_object", "head_object"}


def test_verdicts_of_canaries_are_in_the_folder_for_state(mirror, publish, upload, tmp_path):
    upload(publish(1))
    records = VerdictRecords(tmp_path / "state")
    mirror.versions()
    records.record(mirror.folder(1), Verdict.ERRORS)
    assert (tmp_path / "state" / "colors" / "1.canary.json").exists()
    # Another replica, whose mirror is new.
    mirror.cache = tmp_path / "replica"
    mirror.open()
    mirror.versions()
    assert records.find(mirror.folder(1)) is Verdict.ERRORS


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx: No such file in the store"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "bytes, got 1$"),
        (lambda folder: seal(folder, samples={}), "file name"),
        (lambda folder: (folder / "manifest.json").write_bytes(b" " * 5 * MIB), "at most"),
    ],
    ids=["missing", "size", "manifest", "too large"],
)
def test_a_version_that_does_not_fit_its_manifest_is_not_fetched(
    mirror, publish, upload, spoil, message
):
    upload(publish(1, spoil=spoil))
    mirror.versions()
    with pytest.raises(RepositoryError, match=message):
        mirror.repository.fetch(mirror.folder(1))
    assert not mirror.copied()


def test_a_file_that_changes_while_it_is_fetched_is_rejected(mirror, publish, upload, s3):
    folder = publish(1)
    upload(folder)
    mirror.versions()
    damage(folder)
    upload(folder)
    before = mirror.repository.fingerprint(mirror.folder(1))
    with pytest.raises(VerificationError, match=r"model\.onnx: expected SHA-256 .*, got"):
        mirror.repository.fetch(mirror.folder(1))
    mirror.versions()
    assert mirror.repository.fingerprint(mirror.folder(1)) != before


def test_names_that_are_no_version_are_ignored(mirror, publish, upload, s3):
    upload(publish(1))
    for name in ["colors/01/manifest.json", "../x/1/manifest.json", "colors/2/a/manifest.json"]:
        s3.files.pipe_file(f"{mirror.url}/{name}", b"{}")
    s3.files.pipe_file(f"{mirror.url}/.hidden/1/manifest.json", b"{}")
    assert mirror.versions() == {"colors": (1,)}
    assert sorted(path.name for path in mirror.cache.iterdir()) == ["colors", "lock", "mirror.json"]


def test_an_empty_store_keeps_the_copies(mirror, publish, upload, s3):
    with pytest.raises(RepositoryError, match=r"'s3://bucket/.*' holds no model"):
        mirror.versions()
    upload(publish(1))
    mirror.versions()
    mirror.repository.fetch(mirror.folder(1))
    s3.files.rm(mirror.url, recursive=True)
    with pytest.raises(RepositoryError, match="holds no model"):
        mirror.versions()
    assert mirror.copied() == {"1/model.onnx"}


def test_a_store_that_does_not_answer_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/models"
        mirror = Mirror(tmp_path, url)
        mirror.open(listing_timeout_s=0.2)
        with pytest.raises(UnreadableError, match=r"cannot list http.*: no answer in 0\.2 s"):
            mirror.versions()
        assert mirror.errors == [], "the caller counts what is raised"
        mirror.repository.close()


def test_a_store_that_never_answers_takes_few_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MOST_REQUESTS", 2)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/models"
        stuck = ObjectStore(url, listing_timeout_s=0.05)
        for _ in range(2):
            with pytest.raises(UnreadableError, match=r"no answer in 0\.05 s"):
                stuck.list()
        for _ in range(5):
            with pytest.raises(UnreadableError, match="earlier requests have no answer"):
                stuck.list()
        started = [each for each in set(threading.enumerate()) - before if each.daemon]
        assert [each.name for each in started if each.name == "object-store"] == 2 * [
            "object-store"
        ]


def test_a_url_that_cannot_be_used_is_one_line_without_secrets():
    with pytest.raises(RepositoryError, match="--repository: nonsense://models: Protocol not"):
        ObjectStore("nonsense://models")
    with pytest.raises(UnreadableError) as raised:
        ObjectStore("s3://user:secret@bucket/models").list()
    assert str(raised.value).startswith("cannot list s3://bucket/models: ")
    assert "secret" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_bucket_is_named(mirror):
    mirror.url = "s3://no-such-bucket/models"
    mirror.open()
    with pytest.raises(
        UnreadableError, match=r"cannot list s3://no-such-bucket/models: .*bucket"
    ) as raised:
        mirror.versions()
    assert raised.value.code == "ENOENT"


def test_a_mirror_is_of_one_server_alone(mirror):
    with pytest.raises(RepositoryError, match=r"--cache-dir: .* is in use by another server"):
        MirroredRepository(
            ObjectStore(mirror.url), mirror.cache, MIB, MirrorMetrics(CollectorRegistry())
        )


def test_a_damaged_listing_is_as_none(mirror, publish, upload):
    upload(publish(1))
    mirror.versions()
    for content in ["{", "[]", '{"files": {"colors/1/manifest.json": 3}, "tags": {}}']:
        (mirror.cache / "mirror.json").write_text(content)
        mirror.open()
        assert mirror.versions() == {"colors": (1,)}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


async def test_a_repository_on_a_web_server(publish, tmp_path):
    publish(1)
    handler = partial(_Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            mirror = Mirror(tmp_path, f"http://127.0.0.1:{server.server_port}/models")
            live = Live(mirror.cache, repository=mirror.open())
            await live.manager.start()
            assert live.served == [("colors", 1)]
            publish(2)
            await live.manager.refresh()
            assert live.served == [("colors", 2)]
            policy = {"schema_version": 1, "version": 1}
            (tmp_path / "models/colors/policy.json").write_text(json.dumps(policy))
            await live.manager.refresh()
            assert live.served == [("colors", 1)]
            await live.manager.close()
            mirror.repository.close()
        finally:
            server.shutdown()
