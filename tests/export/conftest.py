"""A small net with lived-in batch norms, its checkpoint, and a version exported from it."""

from pathlib import Path

import pytest
import torch

from convoy.export.formats import ArtifactFormat, Variant
from convoy.export.pipeline import ExportOptions, Published, export
from convoy.export.repository import ModelFolder
from convoy.export.samples import Samples, load_samples
from convoy.export.source import ModelSource, from_checkpoint
from convoy.training import checkpoints, nets
from convoy.training.checkpoints import Architecture, Checkpoint, DataDescription
from convoy.training.data import ImageSet, Preprocessing

MEAN = (0.48, 0.47, 0.44)
STD = (0.21, 0.22, 0.23)
TEMPERATURE = 1.7
PORTABLE_FORMATS = [form for form in ArtifactFormat if form is not ArtifactFormat.AOT_INDUCTOR]


def perturb_batch_norms(net: torch.nn.Module) -> None:
    """Gives running statistics that no fresh net has, so that a wrong folding shows."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    architecture = Architecture("net_res_deep", {"n_chans1": 8, "n_blocks": 2})
    net = nets.create(architecture.name, **architecture.arguments)
    perturb_batch_norms(net)
    path = tmp_path_factory.mktemp("runs") / "best.pt"
    data = DataDescription("digits", tuple("0123456789"), MEAN, STD, Preprocessing())
    metrics = {"epoch": 1.0, "valid_loss": 2.5, "valid_accuracy": 0.25}
    checkpoints.save(
        path, Checkpoint(net.state_dict(), architecture, data, metrics, temperature=TEMPERATURE)
    )
    return path


@pytest.fixture(scope="session")
def source(tiny_checkpoint: Path) -> ModelSource:
    return from_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def samples(source: ModelSource) -> Samples:
    return load_samples("digits", source.data.classes, source.data.preprocessing)


@pytest.fixture(scope="session")
def real(samples: Samples) -> ImageSet:
    return samples.real


@pytest.fixture(scope="session")
def published(
    source: ModelSource, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    target = ModelFolder(tmp_path_factory.mktemp("models"), "digits")
    return export(
        source, samples, target, ExportOptions([Variant(form) for form in PORTABLE_FORMATS])
    )
