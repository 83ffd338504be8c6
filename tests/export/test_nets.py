"""Every format takes the lecture's nets, the fast net and torchvision's, at a small size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export import torchscript
from export.formats import Variant
from export.pipeline import ExportOptions, export
from export.publishing import ModelFolder
from export.samples import Samples
from export.servable import Servable
from export.source import ModelSource
from tests.export.conftest import PORTABLE_FORMATS, perturb_batch_norms
from training import nets

NETS = ["net", "net_res_deep", "airbench", "resnet18", "mobilenet_v3_small", "convnext_tiny"]


def make_source(name: str, like: ModelSource) -> ModelSource:
    torch.manual_seed(0)
    net = nets.create(name)
    perturb_batch_norms(net)
    return ModelSource(net.eval(), like.data, 1.0, "0" * 64, name, {}, {})


@pytest.fixture(scope="module")
def few(samples: Samples) -> Samples:
    """Enough for a full batch of 64 with the hostile samples."""
    pictures = len(samples.pictures)
    rows = np.r_[: 59 - pictures, -pictures:0]
    return replace(samples, real=samples.real.take(rows), validation_count=59 - pictures)


@pytest.mark.parametrize("name", NETS)
def test_every_format_passes_its_proof(
    name: str, source: ModelSource, few: Samples, tmp_path: Path
) -> None:
    options = ExportOptions([Variant(form) for form in PORTABLE_FORMATS])
    published = export(make_source(name, source), few, ModelFolder(tmp_path, name), options)
    assert {variant.format for variant in published.parities} == set(PORTABLE_FORMATS)
    assert all(parity.argmax_agreement == 1 for parity in published.parities.values())
    assert published.manifest.provenance.architecture == name


@pytest.mark.parametrize("name", NETS)
def test_scripting_takes_it_too(
    name: str, source: ModelSource, few: Samples, tmp_path: Path
) -> None:
    made = make_source(name, source)
    servable = Servable(made.net, made.data.mean, made.data.std, 1.0).eval()
    images = few.real.images[:3]
    path = tmp_path / "model.torchscript"
    torchscript.write(servable, torch.from_numpy(images[:2]), path, {}, script=True)
    with torch.no_grad():
        expected = servable(torch.from_numpy(images))[0].numpy()
    np.testing.assert_allclose(torchscript.load(path)(images).logits, expected, atol=1e-4)
