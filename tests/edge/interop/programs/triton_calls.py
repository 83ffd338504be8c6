"""Calls a server by NVIDIA's tritonclient, which brings message classes of its own."""

import json
import queue
import sys
import threading
import traceback
from collections import Counter
from types import SimpleNamespace

import grpc
import numpy as np
import tritonclient.grpc as triton

task = SimpleNamespace(**{"until_version": "", "waiting": "", **json.loads(sys.argv[1])})
LOGITS = (triton.InferRequestedOutput("logits"),)


def inputs(content: bytes = b"") -> list[triton.InferInput]:
    """Return the model's input; the task's images by default."""
    pixels = np.frombuffer(content or bytes.fromhex(task.pixels), np.uint8).reshape(-1, 4, 6, 3)
    tensor = triton.InferInput("image", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    return [tensor]


def answer(result: triton.InferResult) -> dict[str, str]:
    """Return the version that answered and its logits."""
    version = result.get_response().model_version
    return {"version": version, "logits": result.as_numpy("logits").tobytes().hex()}


def code_of(error: triton.InferenceServerException) -> int:
    """Return the number of a status that the client gives as text."""
    return grpc.StatusCode[error.status().removeprefix("StatusCode.")].value[0]


def infer(client: triton.InferenceServerClient, content: bytes = b"", **options: object):
    """Run one inference."""
    return client.infer("colors", inputs(content), outputs=LOGITS, **options)


def unary(client: triton.InferenceServerClient) -> object:
    return answer(infer(client, headers={"x-note": "plain text"}))


def gzip(client: triton.InferenceServerClient) -> object:
    return answer(infer(client, compression_algorithm="gzip"))


def large(client: triton.InferenceServerClient) -> object:
    result = infer(client, bytes(task.large_images * 4 * 6 * 3))
    return result.as_numpy("logits").nbytes


def oversized(client: triton.InferenceServerClient) -> object:
    try:
        infer(client, bytes(100_000 * 4 * 6 * 3))
    except triton.InferenceServerException as error:
        return code_of(error)


def error(client: triton.InferenceServerClient) -> object:
    try:
        client.infer(task.unknown_model, inputs())
    except triton.InferenceServerException as caught:
        return [code_of(caught), caught.message()]


def stream(client: triton.InferenceServerClient) -> object:
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(50):
        client.async_stream_infer("colors", inputs(), request_id=str(number), outputs=LOGITS)
    client.async_stream_infer(task.unknown_model, inputs(), request_id="bad")
    outcomes = {}
    for _ in range(51):
        result, error = answers.get(timeout=60)
        if error:
            outcomes["bad"] = error.message()
        else:
            outcomes[result.get_response().id] = answer(result)["logits"]
    client.stop_stream()
    return outcomes


def deadline(client: triton.InferenceServerClient) -> object:
    errors: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: errors.put(error), stream_timeout=0.3)
    try:
        return code_of(errors.get(timeout=60))
    finally:
        client.stop_stream()


def cancel(client: triton.InferenceServerClient) -> object:
    errors: queue.Queue = queue.Queue()
    client.is_server_live()
    call = client.async_infer("colors", inputs(), lambda result, error: errors.put(error))
    client.is_server_live()
    call.cancel()
    return code_of(errors.get(timeout=60))


def pushback(client: triton.InferenceServerClient) -> object:
    errors: queue.Queue = queue.Queue()
    client.is_server_live()
    client.async_infer("colors", inputs(), lambda result, error: errors.put(error))
    client.is_server_live()
    try:
        infer(client)
    except triton.InferenceServerException as error:
        assert errors.get(timeout=60) is None
        # The client does not show trailers.
        return [code_of(error)]


def secure(client: triton.InferenceServerClient) -> object:
    files = {
        "root_certificates": task.ca,
        "private_key": task.key,
        "certificate_chain": task.certificate,
    }
    with triton.InferenceServerClient(task.secure, ssl=True, **files) as own:
        return answer(infer(own))


def reload(client: triton.InferenceServerClient) -> object:
    versions: Counter[str] = Counter()
    failures: list[str] = []
    counting = threading.Lock()

    def work() -> None:
        while task.until_version not in versions and not failures:
            try:
                version = answer(infer(client))["version"]
                with counting:
                    if not versions:
                        print("calling", flush=True)
                    versions[version] += 1
            except triton.InferenceServerException as error:
                failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"versions": versions, "failures": failures}


CALLS = (unary, gzip, large, oversized, error, stream, deadline, cancel, pushback, secure)


def main() -> None:
    with (
        triton.InferenceServerClient(task.address) as client,
        triton.InferenceServerClient(task.waiting) as slow,
    ):
        outcomes = {}
        for call in (reload,) if task.until_version else CALLS:
            opened = slow if call in (cancel, pushback) else client
            try:
                outcomes[call.__name__] = call(opened)
            except Exception:
                outcomes[call.__name__] = {"unexpected": traceback.format_exc(limit=4)}
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main()
