"""A FastAPI service that classifies uploaded images through a Convoy server.

CONVOY_ADDRESS=127.0.0.1:8001 fastapi run examples/fastapi_gateway.py
curl --data-binary @seven.png http://127.0.0.1:8000/classify
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

from convoy.client import (
    AsyncClient,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
)

# Made before the event loop; it connects in the loop of the first call.
client = AsyncClient(timeout_s=5)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await client.close()


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request) -> dict[str, object]:
    try:
        answer = await client.classify(
            await request.body(), request_id=request.headers.get("x-request-id")
        )
    except ServerError as error:
        raise HTTPException(_status(error), str(error)) from error
    return {"label": answer.best.label, "probability": answer.best.probability}


def _status(error: ServerError) -> int:
    match error:
        case InvalidRequestError():
            return 400
        case OverloadedError():
            return 429
        case DeadlineExceededError():
            return 504
    return 503
