"""The client library against a real server process."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convoy.client
from convoy.client import (
    AsyncClient,
    Classification,
    Client,
    Health,
    ImageError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
    UsageError,
)


@pytest.fixture(scope="module")
def golden(repository):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return dict(samples)


def test_the_public_names_are_those_listed():
    assert sorted(convoy.client.__all__) == sorted(
        name
        for name, value in vars(convoy.client).items()
        if (
            not name.startswith("_")
            and getattr(value, "__module__", "").startswith("convoy.client")
        )
        or name in ("ImageLike", "__version__")
    )


def test_an_image_may_come_in_any_form(server, golden, tmp_path):
    pixels = golden["images"][0]
    path = tmp_path / "digit.png"
    Image.fromarray(pixels).save(path)
    forms = (path, str(path), path.read_bytes(), Image.fromarray(pixels), pixels)
    with Client(server.address) as client:
        answers = {client.classify(form, model="digits", top_k=10).classes for form in forms}
    assert len(answers) == 1
    assert answers.pop()[0].index == golden["logits"][0].argmax()


def test_an_answer_has_its_stage_times(server, golden):
    with Client(server.address) as client:
        started_s = time.perf_counter()
        answer = client.classify(golden["images"][0])
        elapsed_s = time.perf_counter() - started_s
    assert (answer.model, answer.version, answer.batch_size) == ("digits", 1, 1)
    assert 0 < answer.times.inference_s < elapsed_s
    assert answer.times.decode_s == 0


@pytest.mark.parametrize(
    ("image", "arguments", "error"),
    [
        (b"no image", {}, InvalidRequestError),
        (np.zeros((28, 28, 3), np.uint8), {}, InvalidRequestError),
        (np.zeros((32, 32, 3), np.uint8), {"model": "cats"}, ModelNotFoundError),
        (np.zeros((32, 32, 3), np.uint8), {"version": 9}, ModelNotFoundError),
        (np.zeros((32, 32, 3), np.float32), {}, ImageError),
        (np.zeros((32, 32), np.uint8), {}, ImageError),
        (Path("nowhere.png"), {}, ImageError),
    ],
)
def test_each_cause_has_its_error(server, image, arguments, error):
    with Client(server.address) as client, pytest.raises(error):
        client.classify(image, **arguments)


def test_an_unreachable_server_is_unavailable():
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(UnavailableError):
        client.classify(b"x")


def test_a_client_is_shared_between_threads(server, golden):
    expected = golden["logits"].argmax(axis=1)
    with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
        answers = pool.map(client.classify, [golden["images"][n % 16] for n in range(160)])
        assert [answer.best.index for answer in answers] == [expected[n % 16] for n in range(160)]


def test_a_closed_iterator_of_many_images_leaves_no_calls(server, golden):
    with Client(server.address) as client:
        answers = client.classify_many(itertools.repeat(golden["images"][0]), in_flight=4)
        assert next(answers).best.index == golden["logits"][0].argmax()
        answers.close()
        assert client.classify(golden["images"][1]).batch_size == 1


def test_many_images_in_order_without_an_event_loop(server, golden):
    images = [Path("nowhere.png") if n % 10 == 3 else golden["images"][n % 16] for n in range(100)]
    with Client(server.address) as client:
        answers = list(client.classify_many(images, in_flight=8))
    assert len(answers) == 100
    for number, answer in enumerate(answers):
        if number % 10 == 3:
            assert isinstance(answer, ImageError)
        else:
            assert answer.best.index == golden["logits"][number % 16].argmax()


def test_a_window_below_one_is_rejected_at_once():
    with Client("127.0.0.1:1") as client, pytest.raises(UsageError, match="at least 1, got 0"):
        client.classify_many([], in_flight=0)


async def test_a_window_below_one_is_rejected_at_once_in_asyncio():
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UsageError, match="at least 1, got -1"):
            client.classify_many([], in_flight=-1)


async def test_both_clients_infer_and_inspect_the_server_alike(server, golden):
    inputs = {"image": golden["images"]}
    with Client(server.address) as client:
        answer = client.infer("digits", inputs)
        models, health = client.models(), client.health()
        absent = client.health("cats")
        only = client.infer("digits", inputs, version="1", outputs=["probabilities"])
    np.testing.assert_allclose(answer.outputs["logits"], golden["logits"], atol=1e-3)
    assert (answer.model, answer.version, list(only.outputs)) == ("digits", "1", ["probabilities"])
    assert (health, absent) == (Health(live=True, ready=True), Health(live=True, ready=False))
    assert [(m.name, m.version, len(m.labels)) for m in models] == [("digits", 1, 10)]
    async with AsyncClient(server.address) as client:
        again = await client.infer("digits", inputs)
        np.testing.assert_array_equal(again.outputs["logits"], answer.outputs["logits"])
        assert await client.models() == models
        assert await client.health("digits") == health
        with pytest.raises(InvalidRequestError, match="'image'"):
            await client.infer("digits", {"picture": golden["images"]})


async def test_many_images_come_back_in_order_with_errors_in_their_places(server, golden):
    images = [b"no image" if n % 10 == 3 else golden["images"][n % 16] for n in range(200)]
    async with AsyncClient(server.address) as client:
        answers = [answer async for answer in client.classify_many(images, in_flight=16)]
    assert len(answers) == 200
    for number, answer in enumerate(answers):
        if number % 10 == 3:
            assert isinstance(answer, InvalidRequestError)
        else:
            assert isinstance(answer, Classification)
            assert answer.best.index == golden["logits"][number % 16].argmax()


async def test_many_images_are_taken_only_as_fast_as_they_are_answered(server, golden):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield golden["images"][0]

    async with AsyncClient(server.address) as client:
        answers = client.classify_many(endless(), in_flight=4)
        for _ in range(20):
            await anext(answers)
        await answers.aclose()
    assert taken <= 20 + 4 + 1
