"""The engine `local`: verified files, the manifest's steps, no silent fallback."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from convoy.client.batch import (
    BatchJob,
    EngineError,
    Input,
    LocalEngine,
    LocalModel,
    Predictor,
    VersionError,
    run_batch,
    runtime,
)
from convoy.client.batch.items import Item
from convoy.client.batch.version import find_version
from tests.clients.batches import digit_files, local_engine, read_rows
from tests.fake_cuda.runtime import FakeCuda
from tests.processes import run_module


@pytest.fixture
def copy(repository, tmp_path) -> Path:
    """The version's folder in a repository of its own."""
    shutil.copytree(repository, tmp_path / "models")
    return tmp_path / "models" / "digits" / "1"


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def load(repository: Path, **options: object) -> Predictor:
    return Predictor(LocalModel(repository, **options), top_k=1)


class Items:
    """A source of items in memory."""

    def __init__(self, items: list[Item]) -> None:
        self._items = items
        self.total = len(items)

    def items(self, start: int):
        return iter(self._items[start:])


def test_all_forms_of_an_image_give_the_same_row(repository, tmp_path):
    file = digit_files(repository)[0]
    path = tmp_path / "digit.png"
    path.write_bytes(file)
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        pixels = samples["images"][0]
    source = Items([Item("k", form) for form in (str(path), file, pixels)])
    rows = [row for rows in local_engine(repository).predict(source, 0) for row in rows]
    assert len(rows) == 3
    assert len(set(rows)) == 1
    assert rows[0].error is None


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rows_keep_the_order_of_the_items(repository, batch_size):
    files = digit_files(repository)
    items = [Item(str(n), b"x" if n % 5 == 2 else files[n % len(files)]) for n in range(50)]
    engine = local_engine(repository, batch_size=batch_size)
    rows = [row for rows in engine.predict(Items(items), 7) for row in rows]
    assert [row.key for row in rows] == [str(n) for n in range(7, 50)]
    assert [row.key for row in rows if row.error] == [str(n) for n in range(7, 50) if n % 5 == 2]


def test_equal_probabilities_keep_the_lower_index_first():
    from convoy.client.batch.items import _largest

    values = np.array([[0.2, 0.4, 0.4], [0.3, 0.3, 0.3]], np.float32)
    for count in (1, 2, 3, 9):
        np.testing.assert_array_equal(
            _largest(values, count), np.array([[1, 2, 0], [0, 1, 2]])[:, :count]
        )


def test_a_changed_file_is_rejected(repository, copy):
    graph = copy / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(VersionError, match=r"digits' version 1: model\.onnx: expected SHA-256"):
        load(copy.parent.parent)
    graph.unlink()
    with pytest.raises(VersionError, match=r"model\.onnx: No such file"):
        load(copy.parent.parent)
    graph.symlink_to(repository / "digits" / "1" / "model.onnx")
    with pytest.raises(VersionError, match="expected a plain file"):
        load(copy.parent.parent)


def test_a_model_that_differs_from_its_golden_samples_is_rejected(copy):
    edit(copy, lambda m: m["artefacts"][0]["parity"].update(tolerance=1e-12))
    with pytest.raises(VersionError, match="logits of the golden samples differ by"):
        load(copy.parent.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema_version: expected 1, got 2"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(artefacts=m["artefacts"][1:]), "expected an ONNX artifact"),
        (lambda m: m["samples"]["file"].update(name="../x"), "plain file name"),
        (lambda m: m["preprocessing"].pop("interpolation"), "expected bilinear or bicubic"),
        (lambda m: m.update(version=2), "describes model 'digits' version 2"),
    ],
)
def test_an_invalid_manifest_is_rejected(copy, change, message):
    edit(copy, change)
    with pytest.raises(VersionError, match=message):
        load(copy.parent.parent)


def test_the_version_is_the_one_that_a_server_would_take(copy):
    repository = copy.parent.parent
    for number in (2, 10):
        shutil.copytree(copy, copy.parent / str(number))
        edit(copy.parent / str(number), lambda m, n=number: m.update(version=n))
    assert find_version(repository, "digits", 0).manifest.version == 10
    assert find_version(repository, "", 2).manifest.version == 2
    policy = {"schema_version": 1, "version": 1}
    (copy.parent / "policy.json").write_text(json.dumps(policy))
    assert find_version(repository, "digits", 0).manifest.version == 1
    assert find_version(copy.parent / "2", "digits", 0).manifest.version == 2
    for arguments, message in (
        ((repository, "cats", 0), "--model: expected one of digits, got 'cats'"),
        ((repository, "digits", 3), "No such file"),
        ((copy, "digits", 3), "holds model 'digits' version 1"),
        ((copy.parent.parent.parent / "none", "", 0), "--model: expected one of none"),
    ):
        with pytest.raises(VersionError, match=message):
            find_version(*arguments)


@pytest.mark.parametrize("device", ["mps", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_rejected(repository, device):
    with pytest.raises(EngineError, match="--device: expected cpu, cuda or cuda:INDEX"):
        load(repository, device=device)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    double = FakeCuda()
    monkeypatch.setattr(runtime, "ort", double)
    return double


def published_graph(repository: Path) -> bytes:
    return (repository / "digits" / "1" / "model.onnx").read_bytes()


def test_on_cuda_the_engine_computes_in_float32(repository, cuda):
    model = runtime.OnnxModel(published_graph(repository), "cuda:1", 0)
    options = cuda.sessions[0].providers["CUDAExecutionProvider"]
    assert (options["device_id"], options["use_tf32"]) == (1, 0)
    assert len(model.outputs) == 2


def test_only_shapes_may_be_computed_beside_cuda(repository, cuda):
    cuda.on_cpu = lambda operator, name: operator in {"Conv", "Reshape"}
    with pytest.raises(EngineError, match=r"only nodes that compute shapes .*, found Conv$"):
        runtime.OnnxModel(published_graph(repository), "cuda", 0)


def test_cuda_fails_without_a_cuda_device(repository, tmp_path):
    flags = ("--engine", "local", "--repository", repository, "--device", "cuda:7")
    result = run_module("convoy.client", "batch", tmp_path, "--out", tmp_path / "o.csv", *flags)
    assert result.returncode == 1
    assert result.stderr.startswith("convoy-client: --device cuda:7: ")
    assert result.stderr.count("\n") == 1, result.stderr


def test_sixteen_bit_and_damaged_images_are_as_on_the_server(repository, server, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    deep = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    whole = (folder / "deep.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    rows = {}
    for engine in ("local", "grpc"):
        flags = ("--engine", engine, "--address", server.address, "--repository", repository)
        out = tmp_path / f"{engine}.jsonl"
        result = run_module("convoy.client", "batch", folder, "--out", out, *flags)
        assert result.returncode == 3  # three of four failed
        rows[engine] = {row["path"]: row for row in read_rows(out)}
    for path, row in rows["local"].items():
        other = rows["grpc"][path]
        assert (row["label"], row["error"]) == (other["label"], other["error"])
        assert bool(row["error"]) == (path != "deep.png")


def test_an_embedding_of_the_model_becomes_a_column(copy, tmp_path):
    """A graph with a further output, as a user's net may have one."""
    graph = onnx.load(copy / "model.onnx")
    logits = next(node for node in graph.graph.node if "logits" in node.output)
    width = onnx.TensorProto.FLOAT
    graph.graph.output.append(onnx.helper.make_tensor_value_info(logits.input[0], width, None))
    graph.graph.output[-1].name = "embeddings"
    graph.graph.node.append(onnx.helper.make_node("Identity", [logits.input[0]], ["embeddings"]))
    content = graph.SerializeToString()
    (copy / "model.onnx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(copy, lambda m: m["artefacts"][0]["file"].update(sha256=digest, size_bytes=len(content)))
    predictor = Predictor(LocalModel(copy.parent.parent), 1, ("embeddings",))
    out = tmp_path / "out.parquet"
    images = np.zeros((5, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    job = BatchJob(Input(str(tmp_path / "images.npy")), out, outputs=("embeddings",))
    run_batch(job, LocalEngine(predictor, 2, 1))
    session = onnxruntime.InferenceSession(content)
    (expected,) = session.run(["embeddings"], {"image": images})
    found = np.array([row["embeddings"] for row in read_rows(out)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
