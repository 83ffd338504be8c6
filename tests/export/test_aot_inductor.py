"""AOTInductor by option: compiled, proved, published, and loaded by the server's backend."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from convoy.export.errors import UnsupportedNetError
from convoy.export.formats import ArtifactFormat, Variant
from convoy.export.pipeline import ExportOptions, Published, export
from convoy.export.repository import ModelFolder
from convoy.export.samples import Samples
from convoy.export.source import ModelSource
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.errors import DeviceError, RepositoryError
from convoy.server.models.repository import VerifiedFile

VARIANT = Variant(ArtifactFormat.AOT_INDUCTOR)


@pytest.fixture(scope="module")
def compiled(
    source: ModelSource, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    target = ModelFolder(tmp_path_factory.mktemp("models"), "digits")
    return export(source, samples, target, ExportOptions([VARIANT]))


@pytest.mark.slow
def test_it_passes_the_proof_of_float32(compiled: Published) -> None:
    assert (compiled.path / "model.aoti.pt2").is_file()
    assert compiled.parities[VARIANT].max_logit_difference < 1e-4


def package(version: Published) -> VerifiedFile:
    path = version.path / "model.aoti.pt2"
    return VerifiedFile(path.name, path.read_bytes())


@pytest.mark.slow
def test_the_server_runs_it_at_any_batch_size(compiled: Published) -> None:
    backend = load_backend(Runtime.AOT_INDUCTOR, package(compiled), Device("cpu"), threads=1)
    assert (backend.device, backend.platform) == ("cpu", "pytorch_aot_inductor")
    with np.load(compiled.path / "samples.npz", allow_pickle=False) as samples:
        for count in (1, 3, 16):
            found = backend.run(samples["images"][:count]).logits
            np.testing.assert_allclose(found, samples["logits"][:count], atol=1e-4)


@pytest.mark.slow
def test_code_for_another_processor_is_rejected_before_it_runs(
    compiled: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    with pytest.raises(RepositoryError, match=r"this processor \(ABACUS\), got code for "):
        load_backend(Runtime.AOT_INDUCTOR, package(compiled), Device("cpu"), threads=1)


def test_what_is_no_package_is_rejected() -> None:
    file = VerifiedFile("model.aoti.pt2", b"not an archive")
    with pytest.raises(RepositoryError, match=r"model\.aoti\.pt2: torch cannot load it"):
        load_backend(Runtime.AOT_INDUCTOR, file, Device("cpu"), threads=1)


def test_it_is_for_the_cpu() -> None:
    file = VerifiedFile("model.aoti.pt2", b"")
    with pytest.raises(DeviceError, match="compiled for the CPU"):
        load_backend(Runtime.AOT_INDUCTOR, file, Device("cuda"), threads=1)


@pytest.mark.slow
def test_without_a_compiler_nothing_is_published(
    source: ModelSource, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UnsupportedNetError, match="AOTInductor cannot compile the net here"):
        export(
            source, samples, ModelFolder(tmp_path / "models", "digits"), ExportOptions([VARIANT])
        )
    assert not list((tmp_path / "models").rglob("*"))
