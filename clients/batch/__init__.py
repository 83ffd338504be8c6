"""Batch inference: any number of images in, a table of classes out, each image once.

`run_batch` takes a job and an engine, which are plain values and classes of this package:

    job = BatchJob(Input("photos"), Path("out.parquet"))
    engine = LocalEngine(Predictor(LocalModel(Path("models")), top_k=1), batch_size=64, decoders=2)
    print(run_batch(job, engine).classes)

    inputs, listing, archives, arrays, columns   what is read: Item
    engine, local, remote, cluster               what classifies: Item → Row
    tables, parts                                what is written: Row
    job, tally, evaluation, summary              what holds it together
"""

from clients.batch.calls import RemoteModel
from clients.batch.engine import Engine
from clients.batch.errors import BatchError, EngineError, InputError, OutputError, VersionError
from clients.batch.inputs import Input
from clients.batch.job import BatchJob, PartLimits, Progress, run_batch
from clients.batch.local import LocalEngine
from clients.batch.predictor import LocalModel, Predictor
from clients.batch.remote import GrpcEngine
from clients.batch.rows import Item, Row
from clients.batch.shards import Shard
from clients.batch.summary import BatchSummary

__all__ = [
    "BatchError",
    "BatchJob",
    "BatchSummary",
    "Engine",
    "EngineError",
    "GrpcEngine",
    "Input",
    "InputError",
    "Item",
    "LocalEngine",
    "LocalModel",
    "OutputError",
    "PartLimits",
    "Predictor",
    "Progress",
    "RemoteModel",
    "Row",
    "Shard",
    "VersionError",
    "run_batch",
]
