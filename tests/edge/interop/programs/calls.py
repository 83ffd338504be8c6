"""What the Python programs of this folder share: task, message classes, requests, report.

A program gets its task as JSON (`Task`) and prints what each call came to as JSON. It runs in an
environment of its own, so it may import neither Convoy nor its stubs: message classes come from a
descriptor set.
"""

import json
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
IMAGE_BYTES = 4 * 6 * 3

_counting = threading.Lock()


@dataclass(frozen=True)
class Task:
    """What a program is to do.

    Attributes:
        address: A server of the model `colors`.
        descriptors: File with the services' descriptor set.
        pixels: Two images in hexadecimal digits.
        large_images: Images of a large request.
        unknown_model: A name that no model has.
        waiting: A server that holds a request back for seconds and lets one wait, not two.
        secure: A server with mutual TLS, by the files `ca`, `certificate` and `key`.
        until_version: Call until this version has answered; "" for all the other calls instead.
    """

    address: str
    descriptors: str
    pixels: str
    large_images: int
    unknown_model: str
    waiting: str = ""
    secure: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    until_version: str = ""


task = Task(**json.loads(sys.argv[1]))


def _message_classes() -> dict[str, Any]:
    pool = DescriptorPool()
    files = FileDescriptorSet.FromString(Path(task.descriptors).read_bytes()).file
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return {
        message.name: GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{message.name}"))
        for file in files
        for message in file.message_type
    }


_CLASSES = _message_classes()
InferRequest = _CLASSES["ModelInferRequest"]
InferReply = _CLASSES["ModelInferResponse"]
StreamReply = _CLASSES["ModelStreamInferResponse"]
HealthRequest = _CLASSES["HealthCheckRequest"]
HealthReply = _CLASSES["HealthCheckResponse"]


def infer_request(pixels: bytes = b"", model: str = "colors", request_id: str = "") -> Any:
    """Return a ModelInferRequest of some images; those of the task by default."""
    content = pixels or bytes.fromhex(task.pixels)
    request = InferRequest(model_name=model, id=request_id)
    shape = [len(content) // IMAGE_BYTES, 4, 6, 3]
    request.inputs.add(name="image", datatype="UINT8", shape=shape)
    request.outputs.add(name="logits")
    request.raw_input_contents.append(content)
    return request


def large_request() -> Any:
    """Return a request of megabytes."""
    return infer_request(bytes(task.large_images * IMAGE_BYTES))


def oversized_request() -> Any:
    """Return a request of 6.9 MiB, above the limit of 5."""
    return infer_request(bytes(100_000 * IMAGE_BYTES))


def stream_requests(count: int = 50) -> Iterator[Any]:
    """Yield requests with the ids 0, 1, 2 …, and after them one for a model that is not there."""
    for number in range(count):
        yield infer_request(request_id=str(number))
    yield infer_request(model=task.unknown_model, request_id="bad")


def answer(reply: Any) -> dict[str, str]:
    """Return the version that answered and its logits."""
    return {"version": reply.model_version, "logits": reply.raw_output_contents[0].hex()}


def stream_answers(replies: list[Any]) -> dict[str, str]:
    """Return the logits, or the error, by request id."""
    return {
        reply.infer_response.id: reply.error_message
        or reply.infer_response.raw_output_contents[0].hex()
        for reply in replies
    }


def unexpected() -> dict[str, str]:
    """Return what a call ended with that raised something else than it should."""
    return {"unexpected": traceback.format_exc(limit=4)}


def pushback_in(trailers: Iterable[tuple[str, str]]) -> str | None:
    """Return when to try again, in milliseconds."""
    # A dict cannot be made of what grpcio 1.60's asynchronous client gives.
    return next((value for key, value in trailers if key == "grpc-retry-pushback-ms"), None)


def count(versions: Counter[str], version: str) -> None:
    """Count an answer, and tell the test of the first one."""
    with _counting:
        if not versions:
            print("calling", flush=True)
        versions[version] += 1


def tls_files() -> list[bytes]:
    """Return what grpcio takes: the authority, the client's key, its certificate."""
    return [Path(name).read_bytes() for name in (task.ca, task.key, task.certificate)]


def report(outcomes: dict[str, Any]) -> None:
    """Print the outcomes for the test."""
    print(json.dumps(outcomes), flush=True)
