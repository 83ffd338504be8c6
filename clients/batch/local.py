"""The engine `local`: ONNX Runtime in this process, fed by threads that decode."""

from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from clients.batch.decoding import DecodedBatch, decode_batch
from clients.batch.inputs import Source
from clients.batch.predictor import Floats, Predictor
from clients.batch.processors import usable_cpus
from clients.batch.rows import Row, batched


class LocalEngine:
    """Classifies in this process.

    While the model runs one batch, the next ones are decoded and the rows of the last are written.
    Threads decode: Pillow and ONNX Runtime release the interpreter's lock, and on two processors
    they were as fast as processes, which would have to send the pixels over.

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
        """The model's classes."""
        return self._predictor.labels()

    def predict(self, source: Source, start: int) -> Generator[list[Row]]:
        """Yields rows in the order of the items, a batch at a time."""
        device = ThreadPoolExecutor(1, "convoy-device")
        decoders = ThreadPoolExecutor(self._decoders, "convoy-decoder")
        running: deque[tuple[Future[DecodedBatch], Future[Floats]]] = deque()

        def run(decoding: Future[DecodedBatch]) -> Floats:
            return self._predictor.run(decoding.result())

        def take() -> list[Row]:
            decoding, running_model = running.popleft()
            probabilities = running_model.result()
            return self._predictor.rows(decoding.result(), probabilities)

        try:
            for items in batched(source.items(start), self._batch_size):
                decoding = decoders.submit(decode_batch, items, self._predictor.steps)
                running.append((decoding, device.submit(run, decoding)))
                # One batch in the model, one ready for it, one with each decoder.
                if len(running) > self._decoders + 2:
                    yield take()
            while running:
                yield take()
        finally:
            device.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(wait=False, cancel_futures=True)
