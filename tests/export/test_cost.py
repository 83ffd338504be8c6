"""Latencies by batch size, with a clock of the test's own."""

import numpy as np
import pytest

from convoy.export.cost import measure_latencies
from convoy.export.servable import Images, Outputs

IMAGE = np.zeros((2, 2, 3), np.uint8)


class SlowArtifact:
    """Takes a fixed time for each image, on a clock of its own."""

    def __init__(self, image_s: float) -> None:
        self.now_s = 0.0
        self.image_s = image_s

    def clock(self) -> float:
        return self.now_s

    def run(self, images: Images) -> Outputs:
        self.now_s += self.image_s * len(images)
        scores = np.zeros((len(images), 2), np.float32)
        return Outputs(scores, scores)


def test_every_bucket_is_timed() -> None:
    artifact = SlowArtifact(0.001)
    measured = measure_latencies(artifact.run, IMAGE, artifact.clock)
    assert [latency.batch_size for latency in measured] == [1, 2, 4, 8, 16, 32, 64]
    assert [latency.median_s for latency in measured] == pytest.approx(
        [0.001 * latency.batch_size for latency in measured]
    )


def test_slow_artifacts_are_not_waited_for() -> None:
    artifact = SlowArtifact(0.04)
    measured = measure_latencies(artifact.run, IMAGE, artifact.clock)
    assert [latency.batch_size for latency in measured] == [1, 2, 4]
