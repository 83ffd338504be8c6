"""Load that checks every answer: what it is, whose it is, and that none is missing."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.server.conftest import HEIGHT, WIDTH, mean_color_logits


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        codes: By status code, OK among them.
        versions: Answers by the version that gave them.
        wrong: Answers that were not those of the images sent.
    """

    codes: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    wrong: int = 0

    @property
    def answered(self) -> int:
        return self.codes["OK"]


def request_for(images: np.ndarray, model: str = "colors") -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name=model,
        inputs=[{"name": "image", "datatype": "UINT8", "shape": images.shape}],
        raw_input_contents=[images.tobytes()],
    )


class Traffic:
    """Callers that send one request after the other, each with images of its own."""

    def __init__(self, address: str, seed: int = 0) -> None:
        self._address = address
        self._random = np.random.default_rng(seed)
        self.tally = Tally()
        self._answered = asyncio.Event()

    @asynccontextmanager
    async def flowing(self, callers: int = 4) -> AsyncIterator[Tally]:
        """Keeps requests coming while the body runs."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            stop = asyncio.Event()
            tasks = [asyncio.create_task(self._call(stub, stop)) for _ in range(callers)]
            try:
                yield self.tally
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    async def answers(self, more: int) -> None:
        """Waits until so many more requests were answered."""
        wanted = self.tally.answered + more
        while self.tally.answered < wanted:
            self._answered.clear()
            await self._answered.wait()

    async def answered_by(self, version: int) -> None:
        """Waits until this version answered; front ends hear of a switch after it is logged."""
        while not self.tally.versions[str(version)]:
            await self.answers(1)

    async def _call(
        self, stub: inference_pb2_grpc.GRPCInferenceServiceStub, stop: asyncio.Event
    ) -> None:
        while not stop.is_set():
            count = int(self._random.integers(1, 4))
            images = self._random.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
            try:
                reply = await stub.ModelInfer(request_for(images), timeout=30)
            except grpc.aio.AioRpcError as error:
                self.tally.codes[error.code().name] += 1
                await asyncio.sleep(0.01)
                continue
            self.tally.codes["OK"] += 1
            self._answered.set()
            self.tally.versions[reply.model_version] += 1
            logits = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(count, -1)
            self.tally.wrong += not np.allclose(logits, mean_color_logits(images), atol=1e-5)
