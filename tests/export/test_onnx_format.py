"""ONNX keeps a net in one file, and a file of its holds less than 2 GiB."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convoy.export import onnx_format
from convoy.export.errors import UnsupportedNetError
from convoy.export.servable import Servable
from tests.export.conftest import MEAN, STD


class Wide(nn.Module):
    """One layer from a 2 x 2 image to two classes, by as many hidden values as asked for."""

    def __init__(self, hidden: int, device: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(12, hidden, device=device), nn.Linear(hidden, 2, device=device)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels)
        return logits


EXAMPLE = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)


def test_a_net_beyond_two_gigabytes_is_rejected_before_it_is_written(tmp_path: Path) -> None:
    # Weights on the meta device have a size and no memory.
    servable = Servable(Wide(40_000_000, "meta"), MEAN, STD, 1.0).eval()
    message = (
        r"^model\.onnx: weights: expected at most \d+ bytes, .* one ONNX file, got 2400000044; "
        r"--format torchscript .*$"
    )
    with pytest.raises(UnsupportedNetError, match=message):
        onnx_format.write(servable, EXAMPLE, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


def test_the_limit_lies_between_what_fits_and_what_does_not(tmp_path: Path) -> None:
    servable = Servable(Wide(1000, "cpu"), MEAN, STD, 1.0).eval()
    # The net's, then luma, scale and shift.
    weights_bytes = 4 * (15 * 1000 + 2 + 9)
    graph_bytes = 16 * 1024 * 1024
    path = tmp_path / "model.onnx"
    with pytest.raises(UnsupportedNetError, match=f"got {weights_bytes}"):
        onnx_format.write(servable, EXAMPLE, path, {}, weights_bytes + graph_bytes - 1)
    onnx_format.write(servable, EXAMPLE, path, {}, weights_bytes + graph_bytes)
    assert weights_bytes < path.stat().st_size < weights_bytes + graph_bytes
