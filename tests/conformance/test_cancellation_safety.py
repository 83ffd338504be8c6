"""Nobody's answer is lost, doubled or given to another, whatever the neighbors do.

Callers who cancel, who let a deadline of a moment pass, who drop the connection or send what is no
tensor share batches with callers who behave. Each of the latter sends rows that nobody else sends,
so that an answer tells whose it is.
"""

import asyncio
import random

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.conformance.conftest import Target, outputs_of

CALLERS = 24
ROUNDS = 20
Stub = inference_pb2_grpc.GRPCInferenceServiceStub


async def _behaves(stub: Stub, target: Target, seed: int) -> dict[str, np.ndarray]:
    rows = target.rows(1 + seed % 3, seed)
    reply = await stub.ModelInfer(target.request(rows, id=str(seed)), timeout=60)
    assert reply.id == str(seed)
    return outputs_of(reply)


async def _cancels(stub: Stub, target: Target, seed: int, chance: random.Random) -> None:
    call = stub.ModelInfer(target.request(target.rows(2, seed)), timeout=60)
    await asyncio.sleep(chance.uniform(0, 0.004))
    call.cancel()


async def _is_late(stub: Stub, target: Target, seed: int, chance: random.Random) -> None:
    timeout_s = chance.uniform(0.0002, 0.004)
    await stub.ModelInfer(target.request(target.rows(1, seed)), timeout=timeout_s)


async def _is_malformed(stub: Stub, target: Target, seed: int, chance: random.Random) -> None:
    request = target.request(target.rows(2, seed))
    request.raw_input_contents[0] = request.raw_input_contents[0][: chance.randrange(10)]
    await stub.ModelInfer(request, timeout=60)


async def _disconnects(target: Target, seed: int, chance: random.Random) -> None:
    # A connection of its own, lost with calls in flight.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target.address, options=options) as channel:
        stub = Stub(channel)
        calls = [stub.ModelInfer(target.request(target.rows(1, seed + n))) for n in range(3)]
        await asyncio.wait(map(asyncio.ensure_future, calls), timeout=chance.uniform(0, 0.004))


async def _misbehave(stub: Stub, target: Target, number: int, chance: random.Random) -> None:
    for round_ in range(ROUNDS):
        seed = 1_000_000 + number * 1000 + round_
        try:
            match chance.randrange(4):
                case 0:
                    await _cancels(stub, target, seed, chance)
                case 1:
                    await _is_late(stub, target, seed, chance)
                case 2:
                    await _is_malformed(stub, target, seed, chance)
                case _:
                    await _disconnects(target, seed, chance)
        except (grpc.RpcError, asyncio.CancelledError):
            continue


async def _all_answers(target: Target) -> dict[int, dict[str, np.ndarray]]:
    answers: dict[int, dict[str, np.ndarray]] = {}

    async def caller(stub: Stub, number: int) -> None:
        for round_ in range(ROUNDS):
            seed = number * 1000 + round_
            answers[seed] = await _behaves(stub, target, seed)

    async with grpc.aio.insecure_channel(target.address) as channel:
        stub = Stub(channel)
        async with asyncio.TaskGroup() as tasks:
            for number in range(CALLERS):
                tasks.create_task(caller(stub, number))
                chance = random.Random(number)
                tasks.create_task(_misbehave(stub, target, number, chance))
    return answers


@pytest.fixture(scope="module")
def answers(target: Target) -> dict[int, dict[str, np.ndarray]]:
    return asyncio.run(_all_answers(target))


def test_everyone_who_behaves_is_answered(answers):
    assert len(answers) == CALLERS * ROUNDS
    assert all(answers.values())


def test_every_answer_is_the_caller_s_own(answers, target, stub):
    for seed, outputs in answers.items():
        alone = outputs_of(stub.ModelInfer(target.request(target.rows(1 + seed % 3, seed))))
        for name, expected in alone.items():
            np.testing.assert_allclose(
                outputs[name], expected, rtol=1e-3, atol=1e-3, err_msg=f"seed {seed}"
            )


def test_the_server_keeps_answering(answers, target, stub):
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=10).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name=target.model), timeout=10).ready
