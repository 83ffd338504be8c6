"""Classify the images of a Spark table: a Parquet folder with the columns `id` and `image`.

CONVOY_ADDRESS=server:8001 spark-submit examples/spark_classify.py IMAGES LABELS
"""

import sys
from collections.abc import Iterator

import pandas as pd
from pyspark.sql import SparkSession

from convoy.client import Client, ClientError


def classify(tables: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    with Client() as client:  # one for each task, on the executor
        for table in tables:
            answers = list(client.classify_many(table["image"]))
            failed = [isinstance(answer, ClientError) for answer in answers]
            labels = [None if bad else a.best.label for a, bad in zip(answers, failed, strict=True)]
            errors = [str(a) if bad else None for a, bad in zip(answers, failed, strict=True)]
            yield pd.DataFrame({"id": table["id"], "label": labels, "error": errors})


def main(images: str, labels: str) -> None:
    with SparkSession.builder.getOrCreate() as spark:
        table = spark.read.parquet(images)
        table.mapInPandas(classify, "id long, label string, error string").write.parquet(labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
