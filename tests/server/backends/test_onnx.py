"""Buffers bound to a session, as CUDA graphs need them; on a CPU the same without a graph."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from convoy.server.backends.device import CudaOptions, Device
from convoy.server.backends.onnx import OnnxBackend, _providers
from convoy.server.models.repository import VerifiedFile
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits


@pytest.fixture
def backend(publish) -> OnnxBackend:
    path = publish() / "model.onnx"
    file = VerifiedFile(path.name, path.read_bytes())
    return OnnxBackend(file, Device("cpu"), 1, CudaOptions(graphs=True))


def some_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def check(images: np.ndarray, outputs) -> None:
    np.testing.assert_allclose(outputs.logits, mean_color_logits(images), atol=1e-6)
    np.testing.assert_allclose(outputs.probabilities.sum(axis=1), 1, atol=1e-6)


def test_bound_runs_answer_as_plain_ones_at_any_size_and_again(backend):
    for seed in range(3):
        for count in (1, 2, 7, 16):
            images = some_images(count, seed)
            check(images, backend.run(images))


def test_an_answer_outlives_the_next_run_of_its_size(backend):
    first, second = some_images(4, 1), some_images(4, 2)
    outputs = backend.run(first)
    backend.run(second)
    check(first, outputs)


def test_images_that_are_no_block_of_memory_are_taken(backend):
    images = some_images(8, 3)[::2]
    check(images, backend.run(images))


def test_threads_share_the_buffers(backend):
    batches = [some_images(1 + seed % 3, seed) for seed in range(60)]
    with ThreadPoolExecutor(4) as threads:
        for images, outputs in zip(batches, threads.map(backend.run, batches), strict=True):
            check(images, outputs)


def test_float32_means_float32_on_cuda():
    ((provider, options),) = _providers(Device("cuda", 1), CudaOptions())
    assert provider == "CUDAExecutionProvider"
    assert (options["device_id"], options["use_tf32"]) == (1, 0)


def test_memory_of_a_large_batch_is_given_back(publish):
    """Of ONNX Runtime's arena, here on the CPU; on CUDA it is the same option."""
    path = publish() / "model.onnx"
    backend = OnnxBackend(VerifiedFile(path.name, path.read_bytes()), Device("cpu"), 1)
    images = np.zeros((400_000, HEIGHT, WIDTH, 3), np.uint8)
    taken_bytes = 4 * images.size  # as float32
    backend.run(images[:1])
    backend.run(images)
    before_bytes = resident_bytes()
    backend.release_unused(images[:1])
    assert before_bytes - resident_bytes() > taken_bytes / 2


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
