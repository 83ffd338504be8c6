import os

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from server.backends import load_backend
from server.backends.devices import Device, choose_device, count_cuda_devices, usable_cpus
from server.backends.onnx import OnnxBackend
from server.batcher import BatchingLimits
from server.errors import DeviceError, RepositoryError, VerificationError
from server.loading import LoadOptions, ModelLoader, ServedModel
from server.manifest import ArtefactFormat
from server.metrics import ServerMetrics
from server.repository import ModelRepository
from tests.server.conftest import mean_colour_logits, seal


@pytest.fixture
def load(tmp_path):
    def load_newest(device: str = "cpu") -> ServedModel:
        limits = BatchingLimits(max_batch_size=6, max_queue_size=16)
        options = LoadOptions(ArtefactFormat.ONNX, choose_device(device), 1, limits)
        (version,) = ModelRepository(tmp_path / "models").served_versions()
        return ModelLoader(options, ServerMetrics(CollectorRegistry())).load(version)

    return load_newest


def test_a_version_is_loaded_and_answers(publish, load):
    publish()
    model = load()
    assert (model.backend.device, model.backend.provider) == ("cpu", "CPUExecutionProvider")
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), np.uint8)
    outputs = model.backend.run(images)
    np.testing.assert_allclose(outputs.logits, mean_colour_logits(images), atol=1e-6)
    np.testing.assert_allclose(outputs.probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("offset", [0.01, np.nan])
def test_a_version_whose_golden_samples_disagree_is_refused(publish, load, offset):
    folder = publish()
    with np.load(folder / "samples.npz") as samples:
        images, logits = samples["images"], samples["logits"]
    np.savez(folder / "samples.npz", images=images, logits=logits + np.float32(offset))
    seal(folder)
    with pytest.raises(VerificationError, match=r"golden samples differ by .* on cpu"):
        load()


def test_a_file_that_is_no_model_is_refused(publish, load):
    folder = publish()
    (folder / "model.onnx").write_bytes(b"not a graph")
    seal(folder)
    with pytest.raises(RepositoryError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        load()


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error_and_auto_takes_the_cpu():
    with pytest.raises(DeviceError, match="'cuda': the driver offers 0 CUDA devices"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="'cuda:3'"):
        choose_device("cuda:3")
    assert choose_device("auto") == Device("cpu")


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_a_cuda_session_that_falls_back_is_noticed(publish):
    """ONNX Runtime itself does not raise when its CUDA provider cannot be loaded."""
    folder = publish()
    with pytest.raises(DeviceError, match="cuda:0"):
        OnnxBackend(folder / "model.onnx", Device("cuda"), threads=1)


def test_usable_cpus_follow_the_affinity():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_file_that_is_no_exported_program_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"not an archive")
    with pytest.raises(RepositoryError, match=r"model\.pt2: torch cannot load it"):
        load_backend(
            ArtefactFormat.EXPORTED_PROGRAM, tmp_path / "model.pt2", Device("cpu"), threads=1
        )
