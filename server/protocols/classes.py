"""A model's probabilities as the classes that convoy.v1 replies hold."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convoy.v1 import classifier_pb2 as pb
from server.manifest import Manifest

Probabilities = NDArray[np.float32]  # [K]


def best_classes(
    probabilities: Probabilities, top_k: int, labels: Sequence[str]
) -> list[pb.ClassScore]:
    """Returns the most probable classes, at least one, the lower index first in a tie."""
    best = np.argsort(-probabilities, kind="stable")[: max(1, top_k)]
    return [
        pb.ClassScore(
            label=labels[index], index=int(index), probability=float(probabilities[index])
        )
        for index in best
    ]


def abstains(probabilities: Probabilities, manifest: Manifest) -> bool:
    """Says whether the largest probability is below the model's threshold."""
    return bool(probabilities.max() < manifest.abstain_threshold)
