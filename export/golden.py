"""Golden samples: real inputs that travel with a version, so that a server can check it at load."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from export.proof import Expectation
from export.servable import Images

COUNT = 16


def write(path: Path, expected: Expectation) -> int:
    """Writes COUNT real samples with the eager net's logits, and returns how many there are.

    The arrays are those that the manifest's GoldenSamples message lists; none needs pickle.
    """
    rows = np.unique(np.linspace(0, expected.real_count - 1, num=COUNT, dtype=np.int64))
    images = expected.images[rows]
    files = [_encode_png(image) for image in images]
    np.savez(
        path,
        images=images,  # [n, H, W, 3] uint8
        logits=expected.outputs.logits[rows],  # [n, K] float32
        labels=expected.labels[rows],  # [n] int64
        encoded=np.frombuffer(b"".join(files), np.uint8),
        encoded_offsets=np.cumsum([0, *map(len, files)], dtype=np.int64),  # [n + 1]
    )
    return len(rows)


def _encode_png(image: Images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
