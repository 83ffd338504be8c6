"""The engine `ray`: actors on a cluster hold the model, Ray Data moves the images to them.

Every node has to see the input, the table's folder and the model repository under the same paths.
Reading tasks turn shares of the input into chunks of items; the object store holds reading back
where the actors are behind. When a node dies, Ray does again elsewhere what was lost with it.
Chunks come back in the order of the input and are counted here, so each item has one row.
"""

import logging
import pickle
import re
import socket
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import ray

from clients.batch.decoding import decode_batch
from clients.batch.errors import EngineError
from clients.batch.inputs import Source
from clients.batch.predictor import LocalModel, Predictor
from clients.batch.rows import Row, batched

# What a node's death costs, and for small inputs how evenly the actors are used.
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
        cluster: Where.
        local: The model version. An actor has one processor, or one GPU.
        top_k: Classes of a row.
        batch_size: Images in a run of the model.

    Raises:
        BatchError: The version cannot be trusted.
    """

    def __init__(self, cluster: Cluster, local: LocalModel, top_k: int, batch_size: int) -> None:
        self._cluster = cluster
        self._local = replace(local, threads=1)
        self._top_k = top_k
        self._batch_size = batch_size
        # On this machine's processor, to see before the job starts whether the files are sound.
        self._checked = Predictor(replace(local, device="cpu"), top_k)

    @property
    def identity(self) -> Mapping[str, object]:
        """The model version that is run."""
        return {"engine": "ray", **self._checked.identity}

    def labels(self) -> list[str]:
        """The model's classes."""
        return self._checked.labels()

    def predict(self, source: Source, start: int) -> Generator[list[Row]]:
        """Yields rows in the order of the items, a chunk at a time.

        Raises:
            EngineError: There is no such cluster, or it failed for good.
        """
        joined = not ray.is_initialized()
        if joined:
            self._join()
        try:
            yield from self._rows(source, start)
        except ray.exceptions.RayError as error:
            raise EngineError(f"ray: {_first_line(error)}; the same command goes on") from error
        finally:
            if joined:
                ray.shutdown()

    def _join(self) -> None:
        address = self._cluster.address
        try:
            # Ray itself would try for minutes.
            if match := _HOST_AND_PORT.fullmatch(address):
                socket.create_connection((match[1], int(match[2])), _CONNECT_TIMEOUT_S).close()
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
        """A lazy data set of the rows of all chunks, in order."""
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
            fn_constructor_args=(self._local, self._top_k),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            **device,
        )

    def _actors(self) -> tuple[dict[str, float], int]:
        """What an actor takes of a node, and how many there is room for."""
        kind = "GPU" if self._local.device.startswith("cuda") else "CPU"
        count = int(ray.cluster_resources().get(kind, 0))
        if not count:
            raise EngineError(f"--device {self._local.device}: the cluster has no {kind}")
        return ({"num_gpus": 1} if kind == "GPU" else {"num_cpus": _ACTOR_CPUS}), count

    def _shares(self, source: Source, start: int, actors: int) -> Iterator[tuple[int, int]]:
        """Numbers of the first item and counts, -1 for all, for the reading tasks."""
        if source.total is None:
            yield start, -1
            return
        chunks = (source.total - start) // self._batch_size
        count = min(_MOST_CHUNKS_A_TASK, max(1, chunks // (actors * _TASKS_AN_ACTOR)))
        for first in range(start, source.total, count * self._batch_size):
            yield first, count * self._batch_size


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

    def __init__(self, local: LocalModel, top_k: int) -> None:
        self._predictor = Predictor(local, top_k)

    def __call__(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        batch = decode_batch(pickle.loads(chunk["items"]), self._predictor.steps)
        rows = self._predictor.rows(batch, self._predictor.run(batch))
        return {"first": chunk["first"], "rows": pickle.dumps(rows)}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
