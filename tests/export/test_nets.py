"""Every format takes the lecture's nets, the fast net and torchvision's, at a small size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convoy.export import onnx_format, torchscript
from convoy.export.formats import Variant
from convoy.export.pipeline import ExportOptions, export
from convoy.export.repository import ModelFolder
from convoy.export.samples import Samples
from convoy.export.servable import Servable
from convoy.export.source import ModelSource
from convoy.training import nets
from convoy.training.nets import torchvision_nets
from tests.export.conftest import PORTABLE_FORMATS, perturb_batch_norms

NETS = ["net", "net_res_deep", "airbench", "mobilenet_v3_small"]


def make_source(name: str, like: ModelSource) -> ModelSource:
    torch.manual_seed(0)
    net = nets.create(name)
    perturb_batch_norms(net)
    return ModelSource(net.eval(), like.data, 1.0, "0" * 64, name, {}, {})


@pytest.fixture(scope="module")
def few(samples: Samples) -> Samples:
    """Enough for a full batch of 64 with the edge-case samples."""
    pictures = len(samples.pictures)
    rows = np.r_[: 59 - pictures, -pictures:0]
    return replace(samples, real=samples.real.take(rows), validation_count=59 - pictures)


@pytest.mark.slow
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


SIZES_PX = {"inception_v3": 75, "maxvit_t": 224, "vit_h_14": 70}
"""What these take; the others take 64 px."""


@pytest.fixture
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets are made without room for their weights: some have gigabytes of them."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        kept = None if value is None else torch.nn.Parameter(value.to("meta"))
        register(module, name, kept)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", on_meta)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision_nets.names())
def test_every_classifier_of_torchvision_answers_with_logits(
    name: str, without_memory: None
) -> None:
    """In eval mode also inception_v3 and googlenet, whose training answers with a tuple."""
    size_px = SIZES_PX.get(name, 64)
    net = nets.create(name, n_classes=7, image_size=size_px).eval().to("meta")
    servable = Servable(net, (0.5,) * 3, (0.25,) * 3, 1.0).eval().to("meta")
    images = torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8, device="meta")
    logits, probabilities = servable(images)
    assert logits.shape == probabilities.shape == (2, 7)
    assert logits.dtype == probabilities.dtype == torch.float32


FAMILIES = ["resnet18", "convnext_tiny", "squeezenet1_1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_net_of_each_further_family_becomes_onnx(name: str, tmp_path: Path) -> None:
    """NETS have others of all formats; `make model-zoo` has all families in all formats."""
    torch.manual_seed(0)
    net = nets.create(name, n_classes=7, image_size=64).eval()
    perturb_batch_norms(net)
    servable = Servable(net, (0.5,) * 3, (0.25,) * 3, 1.0).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "model.onnx"
    onnx_format.write(servable, torch.from_numpy(images[:2]), path, {})
    with torch.no_grad():
        expected = servable(torch.from_numpy(images))[0].numpy()
    found = onnx_format.load(path)(images).logits
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
