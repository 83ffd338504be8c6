"""Golden samples: real inputs that travel with a version, so that a server can check it at load."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.proof import Expectation


def write(path: Path, expected: Expectation, pictures: Sequence[bytes]) -> int:
    """Writes pictures as tensors and as files, with the eager net's logits; returns their number.

    The arrays are those that the manifest's GoldenSamples message lists; none needs pickle.

    Args:
        path: The .npz file.
        expected: Its last real samples are what the pictures decode to.
        pictures: Image files.
    """
    rows = slice(expected.real_count - len(pictures), expected.real_count)
    np.savez(
        path,
        images=expected.images[rows],  # [n, H, W, 3] uint8
        logits=expected.outputs.logits[rows],  # [n, K] float32
        labels=expected.labels[rows],  # [n] int64
        encoded=np.frombuffer(b"".join(pictures), np.uint8),
        encoded_offsets=np.cumsum([0, *map(len, pictures)], dtype=np.int64),  # [n + 1]
    )
    return len(pictures)
