"""Publishing to an object store: a real S3 server, several exporters, deaths at any step."""

import inspect
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convoy.export import object_store
from convoy.export.errors import InputError, PublishError
from convoy.export.manifest import _without_secrets
from convoy.export.object_store import StoredModel
from convoy.export.repository import model_in, promote, rollback
from convoy.export.versions import local_folder, read_version
from convoy.server.models import store
from convoy.v1 import model_manifest_pb2 as pb
from tests.export.test_versions import run
from tests.processes import running_server
from tests.stores import GcsServer, S3Server, gcs_server, s3_server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture
def url(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """The URL of an empty repository."""
    return "s3://bucket/" + re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def model(url: str) -> StoredModel:
    return model_in(url, "digits")


def publish_once(model: StoredModel, content: bytes = b"weights") -> int:
    def seal(folder: Path, version: int) -> None:
        (folder / "manifest.json").write_text(str(version))

    with model.stage() as staged:
        (staged / "model.onnx").write_bytes(content)
        return model.publish(staged, seal)


def stored(s3: S3Server | GcsServer, url: str) -> dict[str, bytes]:
    start = url.partition("://")[2] + "/"
    return {path.removeprefix(start): s3.files.cat_file(path) for path in s3.files.find(url)}


def test_a_version_is_published_and_served_from_a_store(
    s3, url, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    arguments = [tiny_checkpoint, "--name", "digits", "--repository", url, "--format", "onnx"]
    arguments += ["--samples", 64, "--no-openvino"]
    assert run(monkeypatch, *arguments) == 0
    assert f"published {url}/digits/1\n" in capsys.readouterr().out
    names = set(stored(s3, url))
    assert names == {
        f"digits/1/{name}"
        for name in ("claim.json", "manifest.json", "model.onnx", "report.png", "samples.npz")
    }
    version = f"{url}/digits/1"
    assert run(monkeypatch, "show", version) == 0
    assert "digits" in capsys.readouterr().out
    assert run(monkeypatch, "promote", "digits", 1, "--repository", url) == 0
    flags = ("--cache-dir", tmp_path / "cache", "--device", "cpu", "--poll-s", "0")
    with running_server(url, *flags) as server:
        assert server.wait_for("fetched")["version"] == 1
        assert server.metric("convoy_model_ready", model="digits") == 1
        assert server.metric("convoy_mirror_copies_bytes") > 10_000
    s3.stop()
    try:
        with running_server(url, *flags) as server:
            assert server.metric("convoy_model_ready", model="digits") == 1
            assert server.metric("convoy_repository_errors_total", model="") >= 1
            assert server.metric("convoy_mirror_fetched_bytes_total") == 0
            assert server.wait_for("the store cannot be read; the mirror remains in use")
            assert server.stop() == 0
    finally:
        s3.start()
    assert read_version(local_folder(f"{version}/")).manifest.name == "digits"
    s3.files.pipe_file(f"{version}/model.onnx", b"other")
    with pytest.raises(InputError, match=r"model\.onnx: expected SHA-256"):
        read_version(local_folder(version))
    with pytest.raises(InputError, match="digits/2: no such version"):
        local_folder(f"{url}/digits/2")


def test_exporters_at_once_take_different_numbers(s3, url, model):
    check_that_exporters_at_once_take_different_numbers(s3, url, model)


def test_exporters_at_once_to_google_storage_take_different_numbers():
    with gcs_server() as server:
        url = "gs://bucket/models"
        check_that_exporters_at_once_take_different_numbers(server, url, model_in(url, "digits"))
        promote(model_in(url, "digits"), 3)
        assert json.loads(stored(server, url)["digits/policy.json"])["version"] == 3


def check_that_exporters_at_once_take_different_numbers(s3, url, model):
    contents = [bytes([each]) * 100 for each in range(8)]
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda content: publish_once(model, content), contents))
    assert sorted(numbers) == model.versions() == list(range(1, 9))
    files = stored(s3, url)
    for number, content in zip(numbers, contents, strict=True):
        assert files[f"digits/{number}/model.onnx"] == content
        assert files[f"digits/{number}/manifest.json"] == str(number).encode()
        assert len({json.loads(files[f"digits/{n}/claim.json"])["token"] for n in numbers}) == 8


def test_an_exporter_that_is_late_takes_no_published_number(s3, url, model, monkeypatch):
    """It read the numbers before another exporter published."""
    paths = StoredModel._paths
    late = []

    def read_before(self):
        found = paths(self)
        monkeypatch.setattr(StoredModel, "_paths", paths)
        if not late:
            late.append(publish_once(model_in(url, "digits"), b"first"))
        return found

    with model.stage() as staged:
        (staged / "model.onnx").write_bytes(b"second")
        monkeypatch.setattr(StoredModel, "_paths", read_before)
        number = model.publish(staged, lambda folder, n: (folder / "manifest.json").touch())
    assert (late, number) == ([1], 2)
    assert stored(s3, url)["digits/1/model.onnx"] == b"first"


def test_a_death_at_any_request_leaves_nothing_or_the_whole_version(s3, url, monkeypatch):
    class Killed(BaseException):
        """The end of a process: nothing it does afterwards reaches the store."""

    requests, last = 0, 0
    ask = StoredModel._ask

    def count(self, *arguments):
        nonlocal requests
        requests += 1
        if last and requests >= last:
            raise Killed
        return ask(self, *arguments)

    monkeypatch.setattr(StoredModel, "_ask", count)
    publish_once(model_in(url, "whole"))
    steps = requests
    assert steps >= 7
    for step in range(1, steps + 1):
        model, requests, last = model_in(url, f"m{step}"), 0, step
        with pytest.raises(Killed):
            publish_once(model)
        last = 0
        for version in model.versions():
            assert f"m{step}/{version}/model.onnx" in stored(s3, url)
        assert model.versions() == []
        assert publish_once(model) in {1, 2}


def test_an_upload_that_fails_is_removed_and_its_number_stays_unused(s3, url, model, monkeypatch):
    put = StoredModel._put

    def fail(self, path, file):
        put(self, path, file)
        raise PublishError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(StoredModel, "_put", fail)
        with pytest.raises(PublishError, match=r"^no room$"):
            publish_once(model)
        assert set(stored(s3, url)) == {"digits/1/claim.json"}
        patch.setattr(type(s3.files), "_rm_file", deny)
        # File systems that fsspec keeps hold the method of before.
        s3.files.clear_instance_cache()
        with pytest.raises(PublishError) as raised:
            publish_once(model)
        assert str(raised.value) == f"no room; files may remain in {url}/digits/2"
        assert "digits/2/model.onnx" in stored(s3, url)
    s3.files.clear_instance_cache()
    assert model.versions() == []
    assert publish_once(model) == 3


async def deny(*_: object) -> None:
    raise PermissionError("Access Denied")


def test_the_manifest_keeps_no_secret_of_the_data():
    shown = {
        "digits": "digits",
        "shards:https://me:pass@host/{a,b}.tar?Signature=abc": "shards:https://host/{a,b}.tar",
        "shards:s3://key:secret@bucket/train-00?.tar": "shards:s3://bucket/train-00?.tar",
        "imagefolder:/data/a:b@c/photos": "imagefolder:/data/a:b@c/photos",
    }
    assert {spec: _without_secrets(spec) for spec in shown} == shown


def test_server_and_export_hide_the_same_parts_of_a_url():
    for name in ("without_secrets", "secret_of"):
        ours, theirs = (inspect.getsource(getattr(part, name)) for part in (object_store, store))
        assert ours == theirs


def test_versions_that_another_tool_copied_count(s3, url, model):
    s3.files.pipe_file(f"{url}/digits/7/manifest.json", b"7")
    s3.files.pipe_file(f"{url}/digits/8/model.onnx", b"its manifest comes later")
    s3.files.pipe_file(f"{url}/digits/notes.txt", b"")
    assert model.versions() == [7]
    assert publish_once(model) == 9


def test_a_store_that_ignores_exclusive_writes_gets_no_version(s3, url, model, monkeypatch):
    import s3fs

    call = s3fs.S3FileSystem._call_s3

    async def ignore(self, method, *arguments, **options):
        options.pop("IfNoneMatch", None)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", ignore)
    with pytest.raises(PublishError, match="ignores exclusive writes"):
        publish_once(model)
    assert model.versions() == []


def test_promotions_in_a_store(s3, url, model):
    for _ in range(3):
        publish_once(model)
    assert model.read_policy() is None
    for version in (1, 3, 2):
        promote(model, version)
    assert [rollback(model).version for _ in range(2)] == [3, 1]
    with pytest.raises(InputError, match="expected an earlier promotion"):
        rollback(model)
    with pytest.raises(InputError, match=r"expected one of its versions \(1, 2, 3\), got 4"):
        promote(model, 4)
    assert json.loads(stored(s3, url)["digits/policy.json"]) == {"schema_version": 1, "version": 1}


def test_the_first_training_is_not_repeated(s3, url, model):
    publish_once(model)
    publish_once(model)
    folder = Path(sys.executable).parent
    done = subprocess.run(
        ["sh", "deploy/train-once"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CONVOY_REPOSITORY": url, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"train-once: {url} has digits, nothing to do\n"


def test_the_versions_are_listed(s3, url, model, monkeypatch, capsys):
    assert run(monkeypatch, "list", "digits", "--repository", url) == 0
    assert capsys.readouterr().out == ""
    publish_once(model)
    publish_once(model)
    assert run(monkeypatch, "list", "digits", "--repository", url) == 0
    assert capsys.readouterr().out == "1\n2\n"


@pytest.mark.parametrize("first", [True, False])
def test_promotions_at_once_lose_none(s3, url, model, first):
    for _ in range(2):
        publish_once(model)
    if not first:
        promote(model, 1)
    changes = 0

    def change(before: pb.ServingPolicy | None) -> pb.ServingPolicy:
        nonlocal changes
        changes += 1
        if changes == 1:  # somebody else is faster
            promote(model_in(url, "digits"), 2)
        assert changes == 1 or before.version == 2
        previous = [*before.previous, before.version] if before else []
        return pb.ServingPolicy(schema_version=1, version=1, previous=previous)

    after = model.change_policy(change)
    assert changes == 2
    assert list(after.previous) == ([2] if first else [1, 2])
    assert model.read_policy() == after


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("s3://no-such-bucket/models", "repository s3://no-such-bucket/models: .*not exist"),
        ("https://host/models", "got a web server"),
        ("nonsense://models", "Protocol not known"),
    ],
)
def test_a_store_that_takes_no_version_is_one_line(
    s3, repository, message, tiny_checkpoint, monkeypatch, capsys
):
    with pytest.raises(InputError, match=message), model_in(repository, "m").stage():
        pass
    arguments = [tiny_checkpoint, "--name", "m", "--repository", repository]
    assert run(monkeypatch, *arguments) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_without_write_permission_nothing_is_published(s3, url, model, monkeypatch):
    import s3fs

    call = s3fs.S3FileSystem._call_s3

    async def deny(self, method, *arguments, **options):
        if method == "put_object":
            raise PermissionError("Access Denied")
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", deny)
    with pytest.raises(PublishError, match=r"digits/1/claim\.json: Access Denied"):
        publish_once(model)
