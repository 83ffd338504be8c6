"""Uses with NVIDIA's tritonclient what Triton adds to the protocol: streams, files, classes.

A program of its own, as triton_check.py is. Prints what it saw as JSON.

    python triton_extensions_check.py ADDRESS MODEL SAMPLES.npz
"""

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from itertools import pairwise

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio


def image_input(images: np.ndarray) -> triton.InferInput:
    """The model's input with these pixels."""
    tensor = triton.InferInput("image", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    return tensor


def file_input(files: list[bytes]) -> triton.InferInput:
    """The model's input with these image files."""
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, np.object_))
    return tensor


def streamed(client: triton.InferenceServerClient, model: str, images: np.ndarray) -> dict:
    """Logits by id, and what the stream said of a request that is wrong."""
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number, image in enumerate(images):
        inputs = [image_input(image[np.newaxis])]
        client.async_stream_infer(model, inputs, request_id=str(number))
    client.async_stream_infer("unknown", [image_input(images[:1])], request_id="bad")
    logits, errors = {}, []
    for _ in range(len(images) + 1):
        result, error = answers.get(timeout=60)
        if error:
            errors.append(error.message())
        else:
            logits[result.get_response().id] = result.as_numpy("logits")[0].tolist()
    client.stop_stream()
    return {"stream": [logits[str(n)] for n in range(len(images))], "stream_errors": errors}


async def by_aio(address: str, model: str, images: np.ndarray) -> dict:
    """Logits by the asynchronous client, one call each and by a stream."""

    async def requests() -> AsyncIterator[dict]:
        for number, image in enumerate(images):
            yield {
                "model_name": model,
                "inputs": [image_input(image[np.newaxis])],
                "request_id": str(number),
            }

    async with triton_aio.InferenceServerClient(address) as client:
        calls = [client.infer(model, [image_input(image[np.newaxis])]) for image in images]
        replies = await asyncio.gather(*calls)
        logits = {}
        async for result, error in client.stream_infer(requests()):
            assert error is None
            logits[result.get_response().id] = result.as_numpy("logits")[0].tolist()
    return {
        "aio": [reply.as_numpy("logits")[0].tolist() for reply in replies],
        "aio_stream": [logits[str(n)] for n in range(len(images))],
    }


def main() -> None:
    """Asks for everything."""
    address, model, samples = sys.argv[1:]
    with np.load(samples, allow_pickle=False) as golden:
        images, offsets, encoded = golden["images"], golden["encoded_offsets"], golden["encoded"]
    files = [encoded[a:b].tobytes() for a, b in pairwise(offsets)]
    with triton.InferenceServerClient(address) as client:
        top2 = [triton.InferRequestedOutput("probabilities", class_count=2)]
        classes = client.infer(model, [image_input(images)], outputs=top2, priority=1)
        seen = {
            **streamed(client, model, images),
            **asyncio.run(by_aio(address, model, images)),
            "files": client.infer(model, [file_input(files)]).as_numpy("logits").tolist(),
            "classes": [
                [text.decode() for text in row] for row in classes.as_numpy("probabilities")
            ],
            "config": client.get_model_config(model, as_json=True)["config"],
            "statistics": client.get_inference_statistics(model, as_json=True)["model_stats"][0],
        }
        try:
            client.infer(model, [image_input(images)], timeout=1)
        except triton.InferenceServerException as error:
            seen["late"] = str(error.status())
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
