"""A verified model version that turns decoded batches into rows."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.batch.decoding import DecodedBatch, Preprocessing
from clients.batch.errors import VersionError
from clients.batch.extras import needs_extra
from clients.batch.rows import Row
from clients.batch.version import find_version

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """Which version to run, and where.

    Attributes:
        repository: A model repository, or the folder of one version.
        model: Its name; may stay empty where there is one only.
        version: 0 for the one that a server would serve.
        device: "cpu", "cuda" or "cuda:INDEX".
        threads: Of ONNX Runtime for one batch; 0 for all processors.
    """

    repository: Path
    model: str = ""
    version: int = 0
    device: str = "cpu"
    threads: int = 0


class Predictor:
    """Holds a model version in memory; made only of files that are what the manifest says.

    Args:
        local: Which one.
        top_k: How many classes a row gets.

    Attributes:
        steps: How its images are prepared.

    Raises:
        VersionError: A file or an answer differs from what was published.
        EngineError: The device cannot be used.
        BatchError: ONNX Runtime is not installed.
    """

    def __init__(self, local: LocalModel, top_k: int) -> None:
        with needs_extra("cpu", "the local engine"):
            from clients.batch.runtime import OnnxModel
        version = find_version(local.repository, local.model, local.version)
        try:
            self.steps = Preprocessing.of(version.manifest)
        except ValueError as error:
            raise VersionError(f"{version}: {error}") from error
        samples = version.verified(version.manifest.samples.file)
        self._model = OnnxModel(version.verified(version.onnx.file), local.device, local.threads)
        self._top_k = top_k
        self._name, self._version = version.manifest.name, version.manifest.version
        self._labels = np.array(version.manifest.labels, object)
        self._sha256 = version.onnx.file.sha256
        self._check_golden_samples(samples, version.onnx.parity.tolerance, str(version))

    @property
    def identity(self) -> Mapping[str, object]:
        """The version's name, number and graph."""
        return {"model": self._name, "version": self._version, "sha256": self._sha256}

    def labels(self) -> list[str]:
        """The classes, in the order of the model's outputs."""
        return list(self._labels)

    def run(self, batch: DecodedBatch) -> Floats:
        """Runs the model on a batch; returns probabilities `[n, K]` of the fine images."""
        if not len(batch.pixels):
            return np.empty((0, len(self._labels)), np.float32)
        return self._model.run(batch.pixels)[1]

    def rows(self, batch: DecodedBatch, probabilities: Floats) -> list[Row]:
        """Makes the rows of a batch that was run."""
        fine = self._classes(probabilities)
        return [
            Row(key, *next(fine), self._name, self._version)
            if error is None
            else Row(key, error=error)
            for key, error in zip(batch.keys, batch.errors, strict=True)
        ]

    def _classes(self, probabilities: Floats) -> Iterator[tuple[Any, Any, Any]]:
        """Yields labels, indices and probabilities of each image, as tuples."""
        best = _largest(probabilities, self._top_k)  # [n, k]
        chosen = np.take_along_axis(probabilities, best, axis=1)
        return zip(
            map(tuple, self._labels[best].tolist()),
            map(tuple, best.tolist()),
            map(tuple, chosen.tolist()),
            strict=True,
        )

    def _check_golden_samples(self, samples: bytes, tolerance: float, version: str) -> None:
        """Compares the answers on this device with those of the net that was exported."""
        with np.load(io.BytesIO(samples), allow_pickle=False) as golden:
            images, expected = golden["images"], golden["logits"]
        logits, _ = self._model.run(images)
        difference = float(np.abs(logits - expected).max())
        # The negation also catches NaN.
        if not difference <= tolerance:
            raise VersionError(
                f"{version}: logits of the golden samples differ by {difference:.2g}, "
                f"expected at most {tolerance:.2g}"
            )


def _largest(values: Floats, count: int) -> NDArray[np.intp]:
    """Positions of the largest values of each row, falling; the lower one first in a tie."""
    if count == 1:
        best: NDArray[np.intp] = np.argmax(values, axis=1)
        return best[:, np.newaxis]
    order: NDArray[np.intp] = np.argsort(-values, axis=1, kind="stable")
    return order[:, :count]
