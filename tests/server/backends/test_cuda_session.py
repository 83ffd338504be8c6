"""What a model does on CUDA, by a double of ONNX Runtime's session: graphs, memory, placement."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import structlog
from prometheus_client import CollectorRegistry

from convoy.server.assembly import check_provider, load_options
from convoy.server.backends import onnx as onnx_backend
from convoy.server.backends.device import CudaOptions, Device, Runtime
from convoy.server.backends.onnx import OnnxBackend
from convoy.server.batching import BatchingLimits
from convoy.server.errors import DeviceMemoryError, GoldenSamplesError, StartupError
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.server.models.registry import LoadedModel
from convoy.server.models.repository import VerifiedFile
from convoy.server.settings import ServerSettings, parse_settings
from tests.fake_cuda.runtime import ARENA_FULL, NOT_WHILE_CAPTURING, FakeCuda
from tests.server.conftest import HEIGHT, WIDTH, describe, mean_color_logits, seal

GPU = Device("cuda")
# Longer than a run that need not wait.
_BLOCKED_S = 0.2


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    double = FakeCuda()
    monkeypatch.setattr(onnx_backend, "ort", double)
    return double


@pytest.fixture
def make(publish, cuda) -> Callable[..., OnnxBackend]:
    path = publish() / "model.onnx"
    file = VerifiedFile(path.name, path.read_bytes())
    return lambda options: OnnxBackend(file, GPU, 1, options)


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def check(backend: OnnxBackend, count: int, seed: int = 0) -> None:
    images = some_images(count, seed)
    np.testing.assert_allclose(backend.run(images).logits, mean_color_logits(images), atol=1e-6)


def load(folder: Path, instances: int = 1, devices: int = 1, **options: object) -> LoadedModel:
    limits = BatchingLimits(max_batch_size=8, max_queue_size=64, instances=instances)
    wanted = LoadOptions(Runtime.ONNX_RUNTIME, (GPU,) * devices, 1, limits, **options)
    return ModelLoader(wanted, ServerMetrics(CollectorRegistry())).load(folder)


def test_a_graph_is_captured_once_for_each_size_and_then_replayed(make, cuda):
    backend = make(CudaOptions(graphs=True))
    for seed in range(3):
        for count in (1, 2, 4):
            check(backend, count, seed)
    assert [size for _, size in cuda.captures] == [1, 2, 4]
    assert cuda.replays == 9


def test_the_double_captures_again_on_another_thread(make, cuda):
    """Otherwise the tests that count captures would prove nothing."""
    backend = make(CudaOptions(graphs=True))
    check(backend, 2)
    with ThreadPoolExecutor(1) as other:
        other.submit(check, backend, 2).result()
    assert len(set(cuda.captures)) == 2


async def test_each_instance_captures_warms_up_and_serves_on_its_own_thread(publish, cuda):
    model = load(publish(), instances=2, devices=2, cuda=CudaOptions(graphs=True))
    assert len(cuda.sessions) == 2
    captured = list(cuda.captures)
    sizes = sorted(model.batcher.snapshot().batch_latency_s)
    threads = {thread for thread, _ in captured}
    assert len(threads) == 2
    assert sorted(captured) == sorted((thread, size) for thread in threads for size in sizes)
    assert not cuda.violations
    model.batcher.start()
    images = some_images(48)
    for start in range(48):
        outputs = (await model.batcher.infer(images[start : start + 3])).outputs
        expected = mean_color_logits(images[start : start + 3])
        np.testing.assert_allclose(outputs.logits, expected, atol=1e-6)
    await model.batcher.drain()
    assert cuda.captures == captured, "in service a thread captured again"


def test_nothing_else_runs_while_a_graph_is_captured(make, cuda):
    options = CudaOptions(graphs=True)
    first, second = make(options), make(options)
    check(second, 1)
    ran = threading.Event()

    def run_second() -> None:
        check(second, 1)
        ran.set()

    with ThreadPoolExecutor(1) as other:
        runs = []

        def capture_slowly(size: int) -> None:
            runs.append(other.submit(run_second))
            # Without the lock the other run ends now, and spoils the capture.
            ran.wait(_BLOCKED_S)

        # The other thread has graphs of its own.
        other.submit(check, second, 1).result()
        cuda.fail_capture = capture_slowly
        check(first, 1)
        runs[0].result()
    assert not cuda.violations


def test_what_a_failed_capture_left_is_never_replayed(make, cuda):
    def fail(size: int) -> None:
        if size == 4:
            raise RuntimeError(NOT_WHILE_CAPTURING)

    cuda.fail_capture = fail
    backend = make(CudaOptions(graphs=True))
    with structlog.testing.capture_logs() as logs:
        for seed in range(3):
            for count in (2, 4, 8):
                check(backend, count, seed)
    assert [size for _, size in cuda.captures] == [2, 8]
    assert [(entry["event"], entry["images"]) for entry in logs] == [("no CUDA graph", 4)]


def test_memory_that_runs_out_during_a_capture_ends_it(make, cuda):
    def fail(size: int) -> None:
        raise RuntimeError(ARENA_FULL)

    backend = make(CudaOptions(graphs=True))
    check(backend, 2)
    cuda.fail_capture = fail
    with pytest.raises(DeviceMemoryError, match="no memory for 4 images"):
        backend.run(some_images(4))
    # The sizes before it are replayed, the size itself runs without a graph.
    check(backend, 2, seed=1)
    check(backend, 4, seed=1)
    assert [size for _, size in cuda.captures] == [2]


@pytest.mark.parametrize("graphs", [False, True])
def test_the_warm_up_stops_where_memory_ends(publish, cuda, graphs):
    cuda.memory_images = 4
    model = load(publish(), cuda=CudaOptions(graphs=graphs))
    assert list(model.batcher.snapshot().batch_latency_s) == [1, 2, 4]


def test_the_memory_of_probes_that_are_not_served_is_given_back(publish, cuda):
    cuda.memory_images = 4
    model = load(publish())
    assert cuda.arena_images == model.batcher.limits.max_batch_size <= 4


def test_graphs_keep_the_memory_that_they_refer_to(publish, cuda):
    cuda.memory_images = 4
    load(publish(), cuda=CudaOptions(graphs=True))
    assert cuda.arena_images == 8


def test_the_precision_decides_on_tf32(make, cuda):
    for allowed in (False, True):
        make(CudaOptions(tf32=allowed))
    found = [session.providers["CUDAExecutionProvider"]["use_tf32"] for session in cuda.sessions]
    assert found == [0, 1]


def test_tf32_on_a_cpu_is_float32_and_says_so(publish):
    folder = publish()
    manifest = describe(folder)
    manifest["artefacts"][0]["precision"] = "PRECISION_TF32"
    seal(folder, **{"artefacts": manifest["artefacts"]})
    limits = BatchingLimits(max_batch_size=2, max_queue_size=4)
    options = LoadOptions(Runtime.ONNX_RUNTIME, (Device("cpu"),), 1, limits, precision="tf32")
    with structlog.testing.capture_logs() as logs:
        model = ModelLoader(options, ServerMetrics(CollectorRegistry())).load(folder)
    assert model.runs_on.precision == "tf32"
    assert "no TF32 on a CPU: it computes in float32" in [entry["event"] for entry in logs]


def settings_of(*flags: str) -> ServerSettings:
    return parse_settings(["--repository", "models", *flags])


def test_with_graphs_each_instance_has_a_session(cuda):
    options = load_options(settings_of("--cuda-graphs", "--instances", "2"), (GPU,))
    assert options.devices == (GPU, GPU)
    assert options.limits.instances == 2
    assert load_options(settings_of("--cuda-graphs"), (GPU,)).devices == (GPU,)
    assert load_options(settings_of("--instances", "2"), (GPU,)).devices == (GPU,)


@pytest.mark.parametrize(
    ("flags", "device", "message"),
    [
        (["--backend", "torchscript"], GPU, "expected --backend onnx, got 'torchscript'"),
        (["--cuda-graphs"], GPU, "expected no --cuda-graphs"),
        ([], Device("cpu"), "expected a CUDA device"),
    ],
)
def test_tensorrt_needs_onnx_and_a_gpu(flags, device, message):
    with pytest.raises(StartupError, match=f"--provider tensorrt: {message}"):
        check_provider(settings_of("--provider", "tensorrt", *flags), (device,))


def test_engines_lie_in_the_servers_own_folder_or_beside_the_version(tmp_path):
    folder = Path("models/colors/3")

    def engines(*flags: str) -> Path | None:
        return load_options(settings_of("--provider", "tensorrt", *flags), (GPU,)).engines(folder)

    own = ["--state-dir", str(tmp_path)]
    signed = ["--require-signature", str(tmp_path / "key.pem")]
    assert engines() == Path("models/colors/3.engines")
    assert engines(*own) == engines(*own, *signed) == tmp_path / "colors" / "3.engines"
    # Nothing vouches for an engine that others may write.
    assert engines(*signed) is None


def load_by_tensorrt(folder: Path, engines: Path) -> LoadedModel:
    return load(folder, tensorrt=True, engines=lambda version: engines / version.name)


def test_tensorrt_keeps_one_engine_for_each_artifact(publish, cuda, tmp_path):
    folder = publish()
    for _ in range(2):
        model = load_by_tensorrt(folder, tmp_path)
        assert model.runs_on.provider == "TensorrtExecutionProvider"
    (engine,) = tmp_path.glob("1/*/*.engine")
    assert engine.parent.name == model.manifest.artifacts[0].file.sha256
    assert engine.parent.stat().st_mode & 0o777 == 0o700
    assert engine.read_text() == f"image:8x{HEIGHT}x{WIDTH}x3"


def test_an_engine_that_answers_otherwise_is_rejected(publish, cuda, tmp_path):
    cuda.error = 0.01
    with pytest.raises(GoldenSamplesError, match=r"differ by 0\.01 on cuda:0"):
        load_by_tensorrt(publish(), tmp_path)


def test_where_no_engine_can_be_kept_it_is_built_each_time(publish, cuda, tmp_path):
    (tmp_path / "1").write_text("no folder")
    with structlog.testing.capture_logs() as logs:
        load_by_tensorrt(publish(), tmp_path)
    assert "TensorRT's engines are not kept" in [entry["event"] for entry in logs]
    options = cuda.sessions[0].providers["TensorrtExecutionProvider"]
    assert "trt_engine_cache_enable" not in options
