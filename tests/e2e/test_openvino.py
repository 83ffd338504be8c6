"""OpenVINO beside ONNX Runtime on the same exported artifacts."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from convoy.export import onnx_format
from convoy.export.servable import Servable
from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.cpus import usable_cpus
from convoy.server.models.repository import VerifiedFile
from convoy.training import nets
from tests.needs import needs_openvino

pytestmark = needs_openvino
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VerifiedFile]:
    folder = tmp_path_factory.mktemp("artifacts")

    def export(name: str) -> VerifiedFile:
        path = folder / f"{name}.onnx"
        if not path.exists():
            write(name, path)
        return VerifiedFile(path.name, path.read_bytes())

    return export


def write(name: str, path: Path) -> None:
    torch.manual_seed(0)
    net = nets.create(name).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    onnx_format.write(Servable(net, MEAN, STD, 1.5).eval(), example, path, {})


def load(runtime: Runtime, file: VerifiedFile, threads: int = 1) -> Backend:
    return load_backend(runtime, file, Device("cpu"), threads)


@pytest.mark.parametrize("name", ["net", "net_res_deep", "airbench"])
def test_both_runtimes_give_the_same_answers(artifact, name):
    """In float32: bfloat16, which OpenVINO takes where it may, would differ in the third digit."""
    file = artifact(name)
    ours, theirs = load(Runtime.OPENVINO, file), load(Runtime.ONNX_RUNTIME, file)
    assert sorted(map(str, ours.inputs + ours.outputs)) == sorted(
        map(str, theirs.inputs + theirs.outputs)
    )
    random = np.random.default_rng(0)
    batches = [random.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (1, 2, 7, 32, 64)]
    batches += [np.full((3, 32, 32, 3), value, np.uint8) for value in (0, 255)]
    for images in batches:
        got, expected = ours.run(images), theirs.run(images)
        atol = 1e-5 * max(1.0, float(np.abs(expected.logits).max()))
        np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=atol)
        np.testing.assert_allclose(got.probabilities, expected.probabilities, rtol=0, atol=1e-5)


def busy_s_of_others() -> float:
    """Processor time that all threads but this one took so far."""
    tasks = Path("/proc/self/task")
    me = str(threading.get_native_id())
    others = [task for task in tasks.iterdir() if task.name != me]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in others) / 1e9


def test_one_thread_is_the_callers_own(artifact):
    backend = load(Runtime.OPENVINO, artifact("net_res_deep"), threads=1)
    images = np.zeros((32, 32, 32, 3), np.uint8)
    backend.run(images)
    others_s, started_s = busy_s_of_others(), time.thread_time()
    while (own_s := time.thread_time() - started_s) < 0.5:
        backend.run(images)
    assert busy_s_of_others() - others_s < 0.1 * own_s


@pytest.mark.skipif(usable_cpus() < 2, reason="needs two processors")
def test_two_threads_share_a_batch(artifact):
    backend = load(Runtime.OPENVINO, artifact("net_res_deep"), threads=2)
    images = np.zeros((32, 32, 32, 3), np.uint8)
    others_s = busy_s_of_others()
    for _ in range(2000):
        backend.run(images)
        if busy_s_of_others() - others_s > 0.1:
            return
    pytest.fail("no other thread took part")
