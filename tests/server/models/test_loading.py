import asyncio
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from onnx import NodeProto, TensorProto, helper
from prometheus_client import CollectorRegistry

from convoy.server.backends import device as devices
from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import (
    Device,
    Runtime,
    choose_device,
    choose_devices,
    count_cuda_devices,
)
from convoy.server.backends.onnx import OnnxBackend
from convoy.server.batching import BatchingLimits
from convoy.server.errors import (
    DeviceError,
    GoldenSamplesError,
    GraphError,
    RepositoryError,
    SignatureError,
    VerificationError,
)
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models import loader
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.server.models.registry import LoadedModel
from convoy.server.models.repository import VerifiedFile
from convoy.server.models.signing import verify_signature
from convoy.server.requests import Images, Outputs
from tests.server.conftest import (
    HEIGHT,
    WIDTH,
    change_samples,
    describe,
    mean_color_logits,
    seal,
)


@pytest.fixture
def load(tmp_path):
    def load_newest(
        public_key: Callable[[], Ed25519PublicKey] | None = None, batch_size: int = 0
    ) -> LoadedModel:
        limits = BatchingLimits(max_batch_size=6, max_queue_size=16)
        options = LoadOptions(
            Runtime.ONNX_RUNTIME,
            (Device("cpu"),),
            1,
            limits,
            public_key=public_key,
            batch_size=batch_size,
        )
        folder = max((tmp_path / "models" / "colors").iterdir())
        return ModelLoader(options, ServerMetrics(CollectorRegistry())).load(folder)

    return load_newest


async def outputs_of(model: LoadedModel, images: Images) -> Outputs:
    model.batcher.start()
    prediction = await model.batcher.infer(images)
    await model.batcher.drain()
    return prediction.outputs


def file_at(path: Path) -> VerifiedFile:
    return VerifiedFile(path.name, path.read_bytes())


async def test_a_version_is_loaded_and_answers(publish, load):
    publish()
    model = load()
    assert (model.runs_on.device, model.runs_on.provider) == ("cpu", "CPUExecutionProvider")
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), np.uint8)
    outputs = await outputs_of(model, images)
    np.testing.assert_allclose(outputs.logits, mean_color_logits(images), atol=1e-6)
    np.testing.assert_allclose(outputs.probabilities.sum(axis=1), 1, atol=1e-6)


async def test_its_batch_sizes_are_among_those_measured(publish, load):
    publish()
    snapshot = load().batcher.snapshot()
    sizes = snapshot.preferred_batch_size, snapshot.max_batch_size
    assert set(sizes) <= snapshot.batch_latency_s.keys()
    assert 1 <= sizes[0] <= sizes[1] <= 6


async def test_a_batch_size_that_is_set_is_kept(publish, load):
    publish()
    snapshot = load(batch_size=5).batcher.snapshot()
    assert (snapshot.preferred_batch_size, snapshot.max_batch_size) == (5, 5)
    assert list(snapshot.batch_latency_s) == [1, 2, 4, 5]


@pytest.fixture
def load_on_two(publish, monkeypatch):
    """Loads a version on two devices, one of which may be another than it seems."""

    def load(replace: Callable[[int, Backend], Backend]) -> LoadedModel:
        numbers = itertools.count()
        monkeypatch.setattr(
            loader,
            "load_backend",
            lambda *arguments, **named: replace(next(numbers), load_backend(*arguments, **named)),
        )
        limits = BatchingLimits(max_batch_size=2, max_queue_size=256, instances=4)
        options = LoadOptions(Runtime.ONNX_RUNTIME, (Device("cpu"), Device("cpu")), 1, limits)
        return ModelLoader(options, ServerMetrics(CollectorRegistry())).load(publish())

    return load


class Wrapped:
    """A backend that counts what it is asked for in service, and may answer wrongly."""

    def __init__(self, backend: Backend, offset: float = 0.0) -> None:
        self._backend = backend
        self._offset = np.float32(offset)
        self.images = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def run(self, images: Images) -> Outputs:
        self.images += len(images)
        outputs = self._backend.run(images)
        return Outputs(outputs.logits + self._offset, outputs.probabilities)


async def test_two_devices_share_one_queue_and_answer_alike(load_on_two):
    backends: list[Wrapped] = []

    def wrap(number: int, backend: Backend) -> Wrapped:
        backends.append(Wrapped(backend))
        return backends[-1]

    model = await asyncio.to_thread(load_on_two, wrap)
    assert model.runs_on.device == "cpu,cpu"
    before = [backend.images for backend in backends]
    images = np.random.default_rng(1).integers(0, 256, (128, 4, 6, 3), np.uint8)
    outputs = await outputs_of(model, images)
    np.testing.assert_allclose(outputs.logits, mean_color_logits(images), atol=1e-6)
    assert sum(backend.images for backend in backends) == sum(before) + 128


class Attended(Wrapped):
    """A backend that knows which threads warmed it up."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.threads: set[int] = set()

    def run(self, images: Images) -> Outputs:
        if not images.any():
            self.threads.add(threading.get_ident())
        return super().run(images)


@pytest.mark.parametrize(("kind", "at_once"), [("cpu", 1), ("cuda", 2)])
def test_instances_are_warmed_up_together_where_they_share_the_device(
    publish, monkeypatch, kind, at_once
):
    """The device is the CPU in truth, whatever the options say."""
    backends: list[Attended] = []

    def load_on_cpu(runtime, file, device, *arguments, **named) -> Attended:
        backend = load_backend(runtime, file, Device("cpu"), *arguments, **named)
        backends.append(Attended(backend))
        return backends[-1]

    monkeypatch.setattr(loader, "load_backend", load_on_cpu)
    limits = BatchingLimits(max_batch_size=2, max_queue_size=4, instances=2)
    options = LoadOptions(Runtime.ONNX_RUNTIME, (Device(kind),), 1, limits)
    ModelLoader(options, ServerMetrics(CollectorRegistry())).load(publish())
    assert [len(backend.threads) for backend in backends] == [at_once]


@pytest.mark.parametrize("bad", [0, 1])
def test_golden_samples_must_agree_on_every_device(load_on_two, bad):
    with pytest.raises(GoldenSamplesError, match=r"differ by 0\.5 on cpu"):
        load_on_two(lambda number, backend: Wrapped(backend, 0.5 if number == bad else 0.0))


@pytest.mark.parametrize("offset", [0.01, np.nan])
def test_a_version_whose_golden_samples_disagree_is_rejected(publish, load, offset):
    change_samples(
        publish(), lambda arrays: arrays.update(logits=arrays["logits"] + np.float32(offset))
    )
    with pytest.raises(VerificationError, match=r"golden samples differ by .* on cpu"):
        load()


def test_a_file_that_is_no_model_is_rejected(publish, load):
    folder = publish()
    (folder / "model.onnx").write_bytes(b"not a graph")
    seal(folder)
    with pytest.raises(GraphError, match=r"model\.onnx: expected an ONNX model"):
        load()


def edit_graph(folder: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Changes the published graph and seals the version again, as an attacker with a key would."""
    model = onnx.load(folder / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")
    seal(folder)


def external_weight(name: str = "outside") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return tensor


def foreign_node(op_type: str = "Evil", domain: str = "com.example") -> NodeProto:
    return helper.make_node(op_type, ["image"], ["y"], domain=domain)


def nested(node: NodeProto) -> NodeProto:
    """A branch that is never taken still is loaded."""
    branch = helper.make_graph([node], "branch", [], [])
    return helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.graph.initializer.append(external_weight()), "found external data"),
        (
            lambda m: m.graph.node.append(
                helper.make_node("Constant", [], ["c"], value=external_weight())
            ),
            "found external data",
        ),
        (
            lambda m: m.graph.node.append(
                nested(helper.make_node("Constant", [], ["c"], value=external_weight()))
            ),
            "found external data",
        ),
        (lambda m: m.graph.node.append(foreign_node()), "'Evil' of the domain 'com.example'"),
        (lambda m: m.graph.node.append(nested(foreign_node())), "of the domain 'com.example'"),
        (
            lambda m: m.functions.append(
                helper.make_function("local", "f", ["x"], ["y"], [foreign_node()], [])
            ),
            "of the domain 'com.example'",
        ),
        (lambda m: m.graph.node.append(foreign_node("EPContext", "com.microsoft")), "'EPContext'"),
    ],
)
def test_a_graph_that_reaches_outside_its_file_is_rejected(publish, load, edit, message):
    edit_graph(publish(), edit)
    with pytest.raises(GraphError, match=message) as caught:
        load()
    assert "passwd" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 5),
            r"input: the manifest describes image UINT8 \[-1, 4, 6, 3\], "
            r"the graph has image UINT8 \[-1, 5, 6, 3\]",
        ),
        (lambda m: m.graph.output.pop(), "output: the manifest describes logits .*, probabilities"),
        (
            lambda m: m.graph.input.append(
                helper.make_tensor_value_info("other", TensorProto.FLOAT, [1])
            ),
            "the graph has image .*, other FP32",
        ),
    ],
)
def test_a_graph_with_other_inputs_or_outputs_is_rejected(publish, load, edit, message):
    edit_graph(publish(), edit)
    with pytest.raises(GraphError, match=message):
        load()


@pytest.mark.parametrize("shape", [(8, 1), (1, 3), (8, 4)])
def test_golden_logits_of_another_shape_are_rejected_and_not_stretched(publish, load, shape):
    change_samples(publish(), lambda arrays: arrays.update(logits=np.zeros(shape, "f4")))
    with pytest.raises(GoldenSamplesError, match=r"expected \[8, 3\]"):
        load()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04pickle"])
def test_samples_that_are_no_arrays_are_rejected(publish, load, content):
    folder = publish()
    (folder / "samples.npz").write_bytes(content)
    seal(folder)
    with pytest.raises(VerificationError, match=r"samples\.npz: expected arrays"):
        load()


@pytest.mark.parametrize("name", ["images", "logits", "encoded", "encoded_offsets"])
def test_samples_without_one_of_their_arrays_are_rejected(publish, load, name):
    change_samples(publish(), lambda arrays: arrays.pop(name))
    with pytest.raises(VerificationError, match=r"expected arrays images, logits, encoded and"):
        load()


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"interpolation": "INTERPOLATION_BICUBIC"},
        {"resize_shorter_px": HEIGHT + WIDTH},
    ],
)
def test_a_manifest_that_resizes_otherwise_than_the_exporter_did_is_rejected(
    publish, load, preprocessing
):
    folder = publish()
    steps = describe(folder)["preprocessing"]
    seal(folder, preprocessing={**steps, **preprocessing})
    with pytest.raises(
        GoldenSamplesError, match=r"image file 0 .*: pixels: .* they differ by \d+ .* at most 1$"
    ):
        load()


def test_golden_pictures_may_differ_by_a_rounding_and_no_more(publish, load):
    folder = publish()

    def brighten(arrays):
        arrays["images"] = np.where(arrays["images"] < 255, arrays["images"] + 1, 255)
        arrays["images"] = arrays["images"].astype(np.uint8)
        arrays["logits"] = mean_color_logits(arrays["images"]).astype("f4")

    change_samples(folder, brighten)
    load()
    change_samples(folder, brighten)
    with pytest.raises(GoldenSamplesError, match="differ by 2 from its tensor"):
        load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoded": np.zeros(100, np.uint8)}, r"image file 0 .*: image: expected a JPEG"),
        ({"encoded_offsets": np.arange(4)}, r"encoded_offsets: expected 9 .* got 4"),
        ({"encoded_offsets": np.array(3)}, "expected arrays images"),
        ({"encoded_offsets": np.array([0.5, 2.5])}, "expected arrays images"),
    ],
)
def test_golden_pictures_that_are_none_are_rejected(publish, load, change, message):
    change_samples(publish(), lambda arrays: arrays.update(change))
    with pytest.raises(VerificationError, match=message):
        load()


def spoil_files(folder: Path) -> None:
    """What a writer does that wants its own bytes loaded."""
    for path in folder.iterdir():
        path.write_bytes(b"not what was verified")


async def test_what_was_verified_is_loaded_though_the_files_change_meanwhile(
    publish, load, monkeypatch
):
    folder = publish()

    def load_late(*arguments, **options):
        spoil_files(folder)
        return load_backend(*arguments, **options)

    monkeypatch.setattr(loader, "load_backend", load_late)
    images = np.full((1, HEIGHT, WIDTH, 3), 51, np.uint8)
    np.testing.assert_allclose((await outputs_of(load(), images)).logits, 0.2, atol=1e-6)


def test_the_manifest_that_is_signed_is_the_one_that_is_followed(publish, load, monkeypatch):
    """A writer may not show one manifest to the parser and the signed one to the signature."""
    folder = publish()
    key = Ed25519PrivateKey.generate()
    signed = (folder / "manifest.json").read_bytes()
    (folder / "manifest.sig").write_bytes(key.sign(signed))
    seal(folder, labels=["blue", "green", "red"])

    def verify_late(*arguments):
        (folder / "manifest.json").write_bytes(signed)
        return verify_signature(*arguments)

    monkeypatch.setattr(loader, "verify_signature", verify_late)
    with pytest.raises(SignatureError, match="other bytes"):
        load(public_key=key.public_key)
    assert load(public_key=key.public_key).manifest.labels == ("red", "green", "blue")


def test_a_session_does_not_keep_its_files_bytes(publish):
    file = file_at(publish() / "model.onnx")
    before = sys.getrefcount(file.content)
    backend = OnnxBackend(file, Device("cpu"), threads=1)
    after = sys.getrefcount(file.content)
    assert after == before
    assert backend.provider == "CPUExecutionProvider"


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error_and_auto_takes_the_cpu():
    with pytest.raises(DeviceError, match="'cuda': the driver offers 0 CUDA devices"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="'cuda:3'"):
        choose_device("cuda:3")
    with pytest.raises(DeviceError, match="'cuda:0': the driver offers 0"):
        choose_devices("cuda:all")
    with pytest.raises(DeviceError, match="'cuda:1'"):
        choose_devices("cuda:1,cuda:0")
    assert choose_device("auto") == Device("cpu")
    assert choose_devices("auto") == (Device("cpu"),)


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_a_cuda_session_that_falls_back_is_noticed(publish):
    """ONNX Runtime itself does not raise when its CUDA provider cannot be loaded."""
    folder = publish()
    with pytest.raises(DeviceError, match="cuda:0"):
        OnnxBackend(file_at(folder / "model.onnx"), Device("cuda"), threads=1)


def test_devices_are_taken_in_the_order_named_and_as_often(monkeypatch):
    monkeypatch.setattr(devices, "count_cuda_devices", lambda: 3)
    assert choose_devices("cuda") == choose_devices("auto") == (Device("cuda", 0),)
    assert choose_devices("cuda:2,cuda:0") == (Device("cuda", 2), Device("cuda", 0))
    assert choose_devices("cuda:all") == tuple(Device("cuda", index) for index in range(3))
    assert choose_devices("cpu,cpu") == (Device("cpu"), Device("cpu"))


@pytest.mark.parametrize("form", [Runtime.EXPORTED_PROGRAM, Runtime.TORCHSCRIPT])
def test_a_file_that_is_no_archive_of_torch_is_rejected(form):
    file = VerifiedFile("model.pt", b"not an archive")
    with pytest.raises(RepositoryError, match=r"model\.pt: torch cannot load it"):
        load_backend(form, file, Device("cpu"), threads=1)
