"""The engine `local`: a verified model version in ONNX Runtime, fed by threads that decode."""

import io
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convoy.client.batch.decoding import DecodedBatch, Preprocessing, decode_batch
from convoy.client.batch.errors import EngineError, VersionError, needs_extra
from convoy.client.batch.items import Floats, Row, Source, batched, best_classes, with_outputs
from convoy.client.batch.version import find_version
from convoy.client.cpus import usable_cpus


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model version on disk, and the device to run it on.

    Attributes:
        repository: A model repository, or the folder of one version.
        model: Its name; may be empty if there is only one.
        version: 0 for the one that a server would serve.
        device: "cpu", "cuda" or "cuda:INDEX".
        threads: ONNX Runtime's threads for one batch; 0 for all processors.
    """

    repository: Path
    model: str = ""
    version: int = 0
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """The outputs of the model for n images.

    Attributes:
        probabilities: `[n, K]`.
        outputs: Further outputs `[n, D]` by name.
    """

    probabilities: Floats
    outputs: Mapping[str, Floats]


class Predictor:
    """A model version in memory, made only from files that match the manifest.

    Args:
        local: The version.
        top_k: Classes of a row.
        outputs: Outputs of the model that become columns.

    Attributes:
        steps: The preprocessing of its images.

    Raises:
        VersionError: A file or an answer differs from what was published.
        EngineError: The device cannot be used, or the model has no such output.
        BatchError: ONNX Runtime is not installed.
    """

    def __init__(self, local: LocalModel, top_k: int, outputs: Sequence[str] = ()) -> None:
        with needs_extra("cpu", "the local engine"):
            from convoy.client.batch.runtime import OnnxModel
        version = find_version(local.repository, local.model, local.version)
        try:
            self.steps = Preprocessing.of(version.manifest)
        except ValueError as error:
            raise VersionError(f"{version}: {error}") from error
        samples = version.verified(version.manifest.samples.file)
        self._model = OnnxModel(version.verified(version.onnx.file), local.device, local.threads)
        if missing := sorted(set(outputs) - set(self._model.outputs)):
            raise EngineError(
                f"--columns: {version}: expected some of its outputs, "
                f"{', '.join(self._model.outputs)}, got {missing[0]!r}"
            )
        self._top_k = top_k
        self._outputs = tuple(outputs)
        self._name, self._version = version.manifest.name, version.manifest.version
        self._labels = np.array(version.manifest.labels, object)
        self._sha256 = version.onnx.file.sha256
        self._check_golden_samples(samples, version.onnx.parity.tolerance, str(version))

    @property
    def instances(self) -> int:
        """How many batches are best run at once."""
        return self._model.instances

    @property
    def identity(self) -> Mapping[str, object]:
        """The version's name, number and graph."""
        return {"model": self._name, "version": self._version, "sha256": self._sha256}

    def labels(self) -> list[str]:
        """Return the classes, in the order of the model's outputs."""
        return list(self._labels)

    def run(self, batch: DecodedBatch) -> Answers:
        """Run the model on the decoded images of a batch."""
        if not len(batch.pixels):
            return Answers(np.empty((0, len(self._labels)), np.float32), {})
        names = ("probabilities", *self._outputs)
        probabilities, *others = self._model.run(batch.pixels, names)
        return Answers(probabilities, dict(zip(self._outputs, others, strict=True)))

    def rows(self, batch: DecodedBatch, answers: Answers) -> list[Row]:
        """Make the rows of a completed batch."""
        fine = best_classes(answers.probabilities, self._labels, self._top_k)
        rows = [
            Row(key, *next(fine), self._name, self._version)
            if error is None
            else Row(key, error=error)
            for key, error in zip(batch.keys, batch.errors, strict=True)
        ]
        return with_outputs(rows, answers.outputs) if answers.outputs else rows

    def _check_golden_samples(self, samples: bytes, tolerance: float, version: str) -> None:
        """Compare the outputs on this device with those of the original net."""
        with np.load(io.BytesIO(samples), allow_pickle=False) as golden:
            images, expected = golden["images"], golden["logits"]
        (logits,) = self._model.run(images, ("logits",))
        difference = float(np.abs(logits - expected).max())
        # The negation also catches NaN.
        if not difference <= tolerance:
            raise VersionError(
                f"{version}: logits of the golden samples differ by {difference:.2g}, "
                f"expected at most {tolerance:.2g}"
            )


class LocalEngine:
    """Classifies in this process.

    While the model runs a batch, or several, threads decode the next ones and the rows of the last
    are written. Pillow and ONNX Runtime release the interpreter's lock; on two processors threads
    were as fast as processes, which would have to copy the pixels.

    Args:
        predictor: The model.
        batch_size: Images in a run of the model.
        decoders: Threads that read and decode; 0 for one a processor.
    """

    def __init__(self, predictor: Predictor, batch_size: int, decoders: int) -> None:
        self._predictor = predictor
        self._batch_size = batch_size
        self._decoders = decoders or usable_cpus()

    @property
    def identity(self) -> Mapping[str, object]:
        """The model version that is run."""
        return {"engine": "local", **self._predictor.identity}

    def labels(self) -> list[str]:
        """Return the model's classes."""
        return self._predictor.labels()

    def predict(self, source: Source, start: int, version: int = 0) -> Generator[list[Row]]:
        """Yield rows in the order of the items, a batch at a time."""
        instances = self._predictor.instances
        device = ThreadPoolExecutor(instances, "convoy-device")
        decoders = ThreadPoolExecutor(self._decoders, "convoy-decoder")
        running: deque[tuple[Future[DecodedBatch], Future[Answers]]] = deque()

        def run(decoding: Future[DecodedBatch]) -> Answers:
            return self._predictor.run(decoding.result())

        def take() -> list[Row]:
            decoding, running_model = running.popleft()
            return self._predictor.rows(decoding.result(), running_model.result())

        try:
            for items in batched(source.items(start), self._batch_size):
                decoding = decoders.submit(decode_batch, items, self._predictor.steps)
                running.append((decoding, device.submit(run, decoding)))
                # One batch in each run of the model, one ready for it, one with each decoder.
                if len(running) > self._decoders + instances + 1:
                    yield take()
            while running:
                yield take()
        finally:
            device.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(wait=False, cancel_futures=True)
