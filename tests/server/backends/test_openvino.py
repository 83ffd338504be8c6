"""OpenVINO as another runtime of the ONNX artifact, on hand-made graphs."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.errors import DeviceError, GraphError, RepositoryError, StartupError
from convoy.server.models.repository import VerifiedFile
from convoy.server.requests import Outputs
from tests.needs import needs_openvino
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits


def load(path: Path, threads: int = 1, instances: int = 1) -> Backend:
    file = VerifiedFile(path.name, path.read_bytes())
    return load_backend(Runtime.OPENVINO, file, Device("cpu"), threads=threads, instances=instances)


@pytest.fixture
def graph(publish) -> Path:
    return publish() / "model.onnx"


def some_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def check(images: np.ndarray, outputs: Outputs) -> None:
    np.testing.assert_allclose(outputs.logits, mean_color_logits(images), atol=1e-6)
    np.testing.assert_allclose(outputs.probabilities.sum(axis=1), 1, atol=1e-6)


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_of_any_size_are_answered_in_any_order(graph, threads):
    backend = load(graph, threads)
    for seed, count in enumerate((1, 7, 2, 64, 7, 1, 32)):
        images = some_images(count, seed)
        check(images, backend.run(images))


@needs_openvino
def test_an_answer_outlives_the_next_run(graph):
    backend = load(graph)
    first, second = some_images(4, 1), some_images(4, 2)
    outputs = backend.run(first)
    backend.run(second)
    check(first, outputs)


@needs_openvino
def test_images_that_are_no_block_of_memory_or_read_only_are_taken(graph):
    backend = load(graph)
    plain, scattered, fixed = some_images(2, 2), some_images(8, 3)[::2], some_images(7, 4)
    fixed.flags.writeable = False
    for images in (plain, scattered, fixed, plain):
        check(images, backend.run(images))


@needs_openvino
@pytest.mark.parametrize("instances", [1, 2])
def test_callers_in_several_threads_get_their_own_rows(graph, instances):
    backend = load(graph, instances=instances)
    batches = [some_images(1 + seed % 5, seed) for seed in range(300)]
    with ThreadPoolExecutor(4) as threads:
        for images, outputs in zip(batches, threads.map(backend.run, batches), strict=True):
            check(images, outputs)


def write_choosy_model(path: Path) -> None:
    """Writes a graph that cannot run an odd number of images."""
    pairs = numpy_helper.from_array(np.array([-1, 2 * HEIGHT * WIDTH * 3], np.int64), "pairs")
    start, end = (numpy_helper.from_array(np.array([i], np.int64), f"at{i}") for i in (0, 3))
    last = numpy_helper.from_array(np.array([1], np.int64), "last")
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["pixels", "pairs"], ["paired"]),
        helper.make_node("Slice", ["paired", "at0", "at3", "last"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "choosy",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", HEIGHT, WIDTH, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["pairs_of_n", 3])
            for name in ("logits", "probabilities")
        ],
        [pairs, start, end, last],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_that_fails_raises_and_never_returns_an_earlier_answer(tmp_path, threads):
    """OpenVINO itself returns one where a stream of one thread runs it."""
    write_choosy_model(tmp_path / "model.onnx")
    backend = load(tmp_path / "model.onnx", threads)
    for count in (2, 4):
        backend.run(some_images(count, count))
        with pytest.raises(RuntimeError, match="Reshape"):
            backend.run(some_images(count + 1, 0))
        # Of the same size as before: OpenVINO's own graph would fail again, with the failed size.
        images = some_images(count, 9)
        logits = images.reshape(count // 2, -1)[:, :3]
        assert (backend.run(images).logits == logits).all()


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device
from convoy.server.backends.device import Runtime
from convoy.server.errors import DeviceMemoryError
from convoy.server.models.repository import VerifiedFile

file = VerifiedFile("model.onnx", Path(sys.argv[1]).read_bytes())
backend = load_backend(Runtime.OPENVINO, file, Device("cpu"), threads=int(sys.argv[2]))
images = np.random.default_rng(0).integers(0, 256, (8, 4, 6, 3), np.uint8)
before = backend.run(images).logits
many = np.zeros((400_000, 4, 6, 3), np.uint8)
used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 16 * 2**20, resource.RLIM_INFINITY))
try:
    backend.run(many)
except DeviceMemoryError as error:
    print(error)
# The next run compiles the graph anew, which takes memory too.
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert (backend.run(images[::-1]).logits == before[::-1]).all()
"""


@needs_openvino
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_without_memory_has_its_own_error_and_the_next_one_runs(graph, threads):
    ran = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, graph, str(threads)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ran.stdout, ran.returncode) == ("no memory for 400000 images\n", 0), ran.stderr


UNLOADED = """
import os, signal, sys, threading
from pathlib import Path
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device
from convoy.server.backends.device import Runtime
from convoy.server.models.repository import VerifiedFile

signal.signal(signal.SIGUSR1, lambda *_: print("signaled"))
file = VerifiedFile("model.onnx", Path(sys.argv[1]).read_bytes())
backends = [load_backend(Runtime.OPENVINO, file, Device("cpu"), threads=2)]
thread = threading.Thread(target=backends.clear)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
"""


@needs_openvino
def test_a_signal_is_survived_after_a_model_was_unloaded_on_another_thread(graph):
    ran = subprocess.run(
        [sys.executable, "-c", UNLOADED, graph],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ran.stdout, ran.returncode) == ("signaled\n", 0), ran.stderr


@needs_openvino
def test_cuda_is_rejected_and_never_replaced_by_the_cpu(graph):
    file = VerifiedFile(graph.name, graph.read_bytes())
    with pytest.raises(DeviceError, match="device cuda:1: OpenVINO runs on the CPU only"):
        load_backend(Runtime.OPENVINO, file, Device("cuda", 1), threads=1)


@needs_openvino
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"domain": "com.example"}, GraphError, r"'Cast' of the domain 'com\.example'"),
        ({"op_type": "Nonsense"}, RepositoryError, r"^model\.onnx: OpenVINO cannot load it$"),
    ],
)
def test_foreign_and_unknown_operators_are_rejected(graph, change, error, message):
    model = onnx.load(graph)
    for field, value in change.items():
        setattr(model.graph.node[0], field, value)
    onnx.save(model, graph)
    with pytest.raises(error, match=message):
        load(graph)


@needs_openvino
def test_the_graph_names_its_output_tensors(graph):
    """A tensor may bear several names: those of all nodes that pass it on."""
    model = onnx.load(graph)
    model.graph.node[2].output[0] = "scores"
    model.graph.node[3].input[0] = "scores"
    model.graph.node.append(helper.make_node("Identity", ["scores"], ["logits"]))
    onnx.save(model, graph)
    backend = load(graph)
    assert sorted(map(str, backend.outputs)) == sorted(
        f"TensorSpec(name={name!r}, datatype='FP32', shape=(-1, 3))"
        for name in ("logits", "probabilities")
    )
    check(some_images(3, 0), backend.run(some_images(3, 0)))


@needs_openvino
def test_the_files_bytes_are_not_kept(graph):
    file = VerifiedFile(graph.name, graph.read_bytes())
    before = sys.getrefcount(file.content)
    backend = load_backend(Runtime.OPENVINO, file, Device("cpu"), threads=1)
    after = sys.getrefcount(file.content)
    assert after == before
    assert backend.provider == "openvino-cpu"


ALONE = """
import os, sys
from pathlib import Path

def reject(event, arguments):
    if event in ("os.fork", "os.posix_spawn", "subprocess.Popen") or event.startswith("socket."):
        # A thread that reports in the background would only swallow an exception.
        os.write(2, event.encode())
        os._exit(3)

sys.addaudithook(reject)
import numpy as np
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device
from convoy.server.backends.device import Runtime
from convoy.server.models.repository import VerifiedFile

file = VerifiedFile("model.onnx", Path(sys.argv[1]).read_bytes())
backend = load_backend(Runtime.OPENVINO, file, Device("cpu"), threads=1, instances=2)
print(backend.run(np.zeros((2, 4, 6, 3), np.uint8)).logits.shape)
"""


@needs_openvino
def test_it_calls_nobody_and_writes_nothing(graph, tmp_path):
    """Left to itself it reports every import to its makers, by a process that it forks."""
    home = tmp_path / "home"
    home.mkdir()
    ran = subprocess.run(
        [sys.executable, "-B", "-c", ALONE, graph],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=home,
        env={"HOME": str(home)},
    )
    assert (ran.stdout, ran.returncode) == ("(2, 3)\n", 0), ran.stderr
    assert list(home.iterdir()) == []


def test_without_its_package_the_start_ends_in_one_line_that_names_the_extra(graph):
    code = (
        "import sys; sys.modules['openvino'] = None; "
        "from convoy.server.__main__ import main; main()"
    )
    flags = ("--backend", "openvino", "--device", "cpu", "--port", "0", "--metrics-port", "0")
    ended = subprocess.run(
        [sys.executable, "-c", code, "--repository", graph.parents[2], *flags],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "convoy-server: --backend openvino: expected the extra openvino installed\n"
    )


@pytest.mark.parametrize("runtime", [Runtime.TORCHSCRIPT, Runtime.ONNX_RUNTIME])
def test_each_missing_runtime_is_named_by_its_extra(graph, monkeypatch, runtime):
    for module in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("torch", "onnx"):
        monkeypatch.delitem(sys.modules, f"convoy.server.backends.{module}", raising=False)
    file = VerifiedFile(graph.name, graph.read_bytes())
    with pytest.raises(StartupError, match=rf"expected the extra {runtime.extra} installed"):
        load_backend(runtime, file, Device("cpu"), threads=1)
