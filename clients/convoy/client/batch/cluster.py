"""The engine `ray`: actors on a cluster hold the model, Ray Data moves the images to them.

Every node must see the input, the table's folder and the model repository under the same paths.
Reading tasks turn shares of the input into chunks of items; the object store's limit slows reading
down if the actors cannot keep up. Tasks lost with a node are retried on another. Chunks return
in the order of the input and are counted here, so that each item has one row.
"""

import logging
import pickle
import re
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import ray
import ray.data

from convoy.client.batch.archives import TarArchive
from convoy.client.batch.decoding import decode_batch
from convoy.client.batch.errors import EngineError
from convoy.client.batch.inputs import Chain
from convoy.client.batch.items import Item, Row, Source, batched
from convoy.client.batch.local import LocalModel, Predictor
from convoy.client.batch.tables import columns_of

# It bounds the work lost with a node and, for small inputs, how evenly the actors are used.
_MOST_CHUNKS_A_TASK = 32
_TASKS_AN_ACTOR = 8
_MOST_TASKS = 10_000
# An actor and a reading task share a processor: reading waits for disks, the actor for reading.
_ACTOR_CPUS = 0.9
_READER_CPUS = 0.1
_HOST_AND_PORT = re.compile(r"([^/:]+):(\d{1,5})")
_CONNECT_TIMEOUT_S = 10.0
_BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the actors run.

    Attributes:
        address: Of an existing cluster; "auto" for RAY_ADDRESS or the one on this machine.
    """

    address: str = "auto"


class RayEngine:
    """Classifies on a Ray cluster.

    Args:
        cluster: The cluster.
        local: The model version. An actor has one processor, or one GPU.
        top_k: Classes of a row.
        batch_size: Images in a run of the model.
        outputs: Outputs of the model that become columns.

    Raises:
        BatchError: The version cannot be trusted, or has no such output.
    """

    def __init__(
        self,
        cluster: Cluster,
        local: LocalModel,
        top_k: int,
        batch_size: int,
        *,
        outputs: Sequence[str] = (),
    ) -> None:
        self._cluster = cluster
        self._local = replace(local, threads=1)
        self._top_k = top_k
        self._batch_size = batch_size
        self._outputs = tuple(outputs)
        # On this machine's processor: verifies the files before the job starts.
        self._checked = Predictor(replace(local, device="cpu"), top_k, outputs)

    @property
    def identity(self) -> Mapping[str, object]:
        """The model version that is run."""
        return {"engine": "ray", **self._checked.identity}

    def labels(self) -> list[str]:
        """Return the model's classes."""
        return self._checked.labels()

    def predict(self, source: Source, start: int, version: int = 0) -> Generator[list[Row]]:
        """Yield rows in the order of the items, a chunk at a time.

        Raises:
            EngineError: There is no such cluster, or it failed for good.
        """
        joined = not ray.is_initialized()
        if joined:
            self._join()
        try:
            yield from self._rows(source, start)
        except ray.exceptions.RayError as error:
            raise EngineError(f"ray: {_first_line(error)}; the same command resumes") from error
        finally:
            if joined:
                ray.shutdown()

    def _join(self) -> None:
        address = self._cluster.address
        try:
            # Ray itself would try for minutes.
            if match := _HOST_AND_PORT.fullmatch(address):
                socket.create_connection((match[1], int(match[2])), _CONNECT_TIMEOUT_S).close()
            with _sigterm_kept():
                ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"--address: {address}: {_first_line(error)}") from error

    def _rows(self, source: Source, start: int) -> Iterator[list[Row]]:
        if source.total == start:
            return
        expected = start
        for chunk in self._chunks(source, start).iter_rows():
            rows: list[Row] = pickle.loads(chunk["rows"])
            if chunk["first"] != expected:
                raise EngineError(f"ray: expected item {expected}, got {chunk['first']}")
            expected += len(rows)
            yield rows

    def _chunks(self, source: Source, start: int) -> Any:
        """Return a lazy data set of the rows of all chunks, in order."""
        device, actors = self._actors()
        wanted = [
            {"first": first, "count": count} for first, count in self._shares(source, start, actors)
        ]
        shares = ray.data.from_items(wanted, override_num_blocks=min(len(wanted), _MOST_TASKS))
        # Ray Data configures its log when it is first used.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        shares.context.execution_options.preserve_order = True
        shares.context.target_max_block_size = _BLOCK_BYTES
        shares.context.enable_progress_bars = False
        return shares.map_batches(
            _Reader(source, self._batch_size), batch_size=1, num_cpus=_READER_CPUS
        ).map(
            _Actor,
            fn_constructor_args=(self._local, self._top_k, self._outputs),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            **device,
        )

    def _actors(self) -> tuple[dict[str, float], int]:
        """Return the resources of an actor, and how many actors the cluster has room for."""
        kind = "GPU" if self._local.device.startswith("cuda") else "CPU"
        count = int(ray.cluster_resources().get(kind, 0))
        if not count:
            raise EngineError(f"--device {self._local.device}: the cluster has no {kind}")
        return ({"num_gpus": 1} if kind == "GPU" else {"num_cpus": _ACTOR_CPUS}), count

    def _shares(self, source: Source, start: int, actors: int) -> Iterator[tuple[int, int]]:
        """Yield for each reading task the number of its first item and its count."""
        chunks = (source.total - start) // self._batch_size
        count = min(_MOST_CHUNKS_A_TASK, max(1, chunks // (actors * _TASKS_AN_ACTOR)))
        for span in _spans(source):
            first = max(start, span.start)
            step = len(span) if span.step > 1 else count * self._batch_size
            for number in range(first, span.stop, step):
                yield number, min(step, span.stop - number)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces by an exit with code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def classify_dataset(
    dataset: "ray.data.Dataset",
    local: LocalModel,
    *,
    image_column: str = "image",
    top_k: int = 1,
    batch_size: int = 64,
    actors: tuple[int, int] = (1, 4),
) -> "ray.data.Dataset":
    """Classify the images of a Ray data set, lazily, in a pool of actors that grows as needed.

    Args:
        dataset: Has a column of encoded images.
        local: The model version; each node sees it under the same path.
        image_column: That column.
        top_k: Classes of a row.
        batch_size: Images in a run of the model.
        actors: The least and the most actors; each takes one processor, or one GPU.

    Returns:
        The data set with the columns label, index, probability, labels, indices, probabilities,
        model, version and error added.
    """
    on_gpu = local.device.startswith("cuda")
    return dataset.map_batches(
        _DatasetActor,
        fn_constructor_args=(replace(local, threads=1), top_k, image_column),
        batch_size=batch_size,
        batch_format="pyarrow",
        concurrency=actors,
        num_cpus=0 if on_gpu else _ACTOR_CPUS,
        num_gpus=1 if on_gpu else 0,
    )


class _DatasetActor:
    """Adds the columns of rows to a batch of a data set."""

    def __init__(self, local: LocalModel, top_k: int, image_column: str) -> None:
        self._predictor = Predictor(local, top_k)
        self._image_column = image_column

    def __call__(self, batch: Any) -> Any:
        images = batch.column(self._image_column).to_pylist()
        items = [Item(str(number), image or b"") for number, image in enumerate(images)]
        decoded = decode_batch(items, self._predictor.steps)
        rows = self._predictor.rows(decoded, self._predictor.run(decoded))
        for name, values in columns_of(rows).items():
            batch = batch.append_column(name, values)
        return batch


def _spans(source: Source) -> Iterator[range]:
    """Yield the items of each part of a source; as one part if one task must read them all."""
    parts = [each for _, each in source.parts] if isinstance(source, Chain) else [source]
    first = 0
    for part in parts:
        # A compressed stream can only be read from its start.
        whole = isinstance(part, TarArchive) and part.is_compressed
        if part.total:
            yield range(first, first + part.total, part.total if whole and part.total > 1 else 1)
        first += part.total


class _Reader:
    """Turns a share of the input into chunks."""

    def __init__(self, source: Source, chunk_size: int) -> None:
        self._source = source
        self._chunk_size = chunk_size

    def __call__(self, share: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        first, count = int(share["first"][0]), int(share["count"][0])
        items = islice(self._source.items(first), count if count >= 0 else None)
        for chunk in batched(items, self._chunk_size):
            yield {"first": np.array([first]), "items": np.array([pickle.dumps(chunk)], object)}
            first += len(chunk)


class _Actor:
    """Holds the model on a node."""

    def __init__(self, local: LocalModel, top_k: int, outputs: Sequence[str]) -> None:
        self._predictor = Predictor(local, top_k, outputs)

    def __call__(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        batch = decode_batch(pickle.loads(chunk["items"]), self._predictor.steps)
        rows = self._predictor.rows(batch, self._predictor.run(batch))
        return {"first": chunk["first"], "rows": pickle.dumps(rows)}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
