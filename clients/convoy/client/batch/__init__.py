"""Batch jobs: classify any number of images into a table with one row per image.

job = BatchJob(Input("photos"), Path("out.parquet"))
engine = LocalEngine(Predictor(LocalModel(Path("models")), top_k=1), batch_size=64, decoders=2)
print(run_batch(job, engine).classes)

inputs: files, archives, arrays, parquet   sources of items, numbered and fixed at the start
local: decoding, version, runtime          engines that turn items into rows
remote: calls; cluster
tables, parts                              rows to files; the parts of an unfinished job
counts, evaluation, summary                what a job reports
job                                        run_batch, stream_batch
finished                                   retry_errors, merge_tables, evaluate_table
"""

import os

from convoy.client.batch.calls import RemoteModel
from convoy.client.batch.errors import (
    BatchError,
    EngineError,
    InputError,
    OutputError,
    VersionError,
)
from convoy.client.batch.finished import evaluate_table, merge_tables, retry_errors
from convoy.client.batch.inputs import Input
from convoy.client.batch.items import Item, Row, Shard
from convoy.client.batch.job import (
    BatchJob,
    Engine,
    PartLimits,
    Progress,
    run_batch,
    stream_batch,
)
from convoy.client.batch.local import LocalEngine, LocalModel, Predictor
from convoy.client.batch.remote import GrpcEngine
from convoy.client.batch.summary import BatchSummary, ErrorLimit

# ONNX Runtime and Ray read these when they are imported; otherwise they report to their vendors.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__all__ = [
    "BatchError",
    "BatchJob",
    "BatchSummary",
    "Engine",
    "EngineError",
    "ErrorLimit",
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
    "evaluate_table",
    "merge_tables",
    "retry_errors",
    "run_batch",
    "stream_batch",
]
