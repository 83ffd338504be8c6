"""Classify images in Celery tasks.

From this folder, with CONVOY_ADDRESS set:  celery --app celery_tasks worker
From a program:                             classify.delay("seven.png").get()
"""

import os
from functools import cache

from celery import Celery

from convoy.client import Client, OverloadedError, UnavailableError

app = Celery(
    "celery_tasks",
    broker=os.environ.get("CELERY_BROKER_URL", "memory://"),
    backend=os.environ.get("CELERY_RESULT_BACKEND", "cache+memory://"),
)


@cache
def client() -> Client:
    """Return this process's client; the workers fork before their first task."""
    return Client()


@app.task(autoretry_for=(OverloadedError, UnavailableError), retry_backoff=True, max_retries=8)
def classify(path: str) -> dict[str, object]:
    best = client().classify(path).best
    return {"path": path, "label": best.label, "probability": best.probability}
