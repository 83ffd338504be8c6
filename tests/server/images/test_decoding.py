"""Decoding beside files that are made to take long."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from convoy.server.errors import DeadlineExceededError, InvalidRequestError, OverloadedError
from convoy.server.images import decoding
from convoy.server.images.decoding import DecodeThreads, ImageDecoder, decode_image
from convoy.server.models.manifest import Interpolation, Preprocessing
from tests.image_files import encode, photograph, with_scans

STEPS = Preprocessing(8, 8, 0, Interpolation.BILINEAR)
MAX_PIXELS = 50_000_000
SMALL = encode(photograph(8, 8))


@pytest.fixture(scope="module")
def many_scans() -> bytes:
    """A small file under every limit whose decoding takes many seconds of processor time."""
    encoded = with_scans(480, 7000)
    assert len(encoded) < 300_000
    return encoded


@contextlib.contextmanager
def decoder(
    workers: int = 2, max_waiting: int = 64, **options: float
) -> Iterator[tuple[ImageDecoder, DecodeThreads]]:
    with contextlib.closing(DecodeThreads(workers, **options)) as threads:
        yield ImageDecoder(threads, workers, MAX_PIXELS, max_waiting), threads


def test_the_deadline_counts_inside_a_file(many_scans):
    deadline_s = time.monotonic() + 0.2
    started_s = time.thread_time()
    with pytest.raises(DeadlineExceededError):
        decode_image(many_scans, STEPS, MAX_PIXELS, lambda: time.monotonic() > deadline_s)
    # At most the deadline, and one block of the file after it.
    assert time.thread_time() - started_s < 2


async def test_slow_files_end_with_their_deadline_and_leave_the_threads_free(many_scans):
    with decoder() as (images, threads):
        deadline_s = time.monotonic() + 0.5
        slow = [
            asyncio.create_task(images.decode([many_scans], STEPS, deadline_s)) for _ in range(4)
        ]
        ended = await asyncio.gather(*slow, return_exceptions=True)
        assert [type(error) for error in ended] == [DeadlineExceededError] * 4
        assert (await images.decode([SMALL], STEPS)).shape == (1, 8, 8, 3)
        # Each thread stops at the next block of its file.
        for _ in range(6000):
            if threads.slow == 0:
                break
            await asyncio.sleep(0.01)
        assert threads.slow == 0


class _Announced(bytes):
    """A file that tells when a thread begins to look at it."""

    def __new__(cls, content: bytes, taken: threading.Event) -> "_Announced":
        file = super().__new__(cls, content)
        file.taken = taken
        return file

    def startswith(self, *args: object) -> bool:
        self.taken.set()
        return super().startswith(*args)


async def test_decoding_stops_when_nobody_waits_for_it(many_scans):
    with decoder(workers=1, max_waiting=1) as (images, _):
        taken = threading.Event()
        started_s = time.process_time()
        waiting = asyncio.create_task(images.decode([_Announced(many_scans, taken)], STEPS))
        assert await asyncio.to_thread(taken.wait, 60)
        with pytest.raises(OverloadedError, match="1 of 1 images wait"):
            await images.decode([SMALL], STEPS)
        waiting.cancel()
        assert await _decoded_at_last(images)
        # Whole, it would have taken more than all of this.
        assert time.process_time() - started_s < 5


async def test_duration_and_wait_are_counted_for_each_request_that_has_files(monkeypatch):
    """The one thread is busy until the gate opens; other requests wait for it."""
    gate, taken = threading.Event(), threading.Event()
    times: list[tuple[float, float]] = []

    def busy_at_first(*_: object) -> np.ndarray:
        taken.set()
        gate.wait(60)
        return np.zeros((1, 8, 8, 3), np.uint8)

    def tell(duration_s: float, queued_s: float) -> None:
        times.append((duration_s, queued_s))

    monkeypatch.setattr(decoding, "decode_image", busy_at_first)
    with decoder(workers=1, slow_after_s=60) as (images, _):
        busy = asyncio.create_task(images.decode([SMALL], STEPS, on_decoded=tell))
        assert await asyncio.to_thread(taken.wait, 60)
        assert images.queued == 1
        waiting = asyncio.create_task(images.decode([SMALL, SMALL], STEPS, on_decoded=tell))
        with pytest.raises(DeadlineExceededError):
            await images.decode([SMALL], STEPS, time.monotonic() + 0.05, tell)
        assert images.queued == 3
        gate.set()
        await asyncio.gather(busy, waiting)
        assert await images.decode_each([], STEPS, on_decoded=tell) == []
    assert images.queued == 0
    hopeless, first, second = times
    # Its whole time was a wait for the thread.
    assert hopeless[0] == hopeless[1] >= 0.05
    # The thread was free for it, and busy with it at least as long as the others waited.
    assert first[1] < first[0]
    assert second[0] >= second[1] >= hopeless[1]


async def _decoded_at_last(images: ImageDecoder) -> np.ndarray:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OverloadedError):
                return [await images.decode([SMALL], STEPS)]
            await asyncio.sleep(0.01)


async def test_four_calls_that_cannot_be_interrupted_do_not_stop_decoding(monkeypatch):
    """WebP is decoded in a single call; other threads take over meanwhile."""
    monkeypatch.setattr(decoding, "_WATCH_EVERY_S", 0.02)
    picture = encode(Image.effect_noise((3000, 3000), 90).convert("RGB"), "WEBP", method=0)
    counted = []
    options = {"slow_after_s": 0.02, "on_slow": lambda: counted.append(1)}
    with decoder(**options) as (images, _):
        slow = [asyncio.create_task(images.decode([picture], STEPS)) for _ in range(4)]
        small = asyncio.create_task(images.decode([SMALL], STEPS))
        first, _ = await asyncio.wait({small, *slow}, return_when=asyncio.FIRST_COMPLETED)
        assert first == {small}
        # Two threads for small and one of the four, so three were substituted at least.
        assert len(counted) >= 3
        for pixels in await asyncio.gather(*slow):
            assert pixels.shape == (1, 8, 8, 3)


def test_a_substituted_thread_ends_with_its_job_and_the_number_of_them_is_bounded():
    stuck, started = threading.Event(), threading.Semaphore(0)

    def wait() -> str:
        started.release()
        stuck.wait(60)
        return "done"

    with contextlib.closing(DecodeThreads[str](2, slow_after_s=0.0, max_slow=3)) as threads:
        waiting = [threads.submit(wait) for _ in range(5)]
        for _ in range(2):
            assert started.acquire(timeout=60)
        while threads.slow < 3:
            threads.substitute_slow()
        for _ in range(3):
            assert started.acquire(timeout=60)
        threads.substitute_slow()
        assert threads.slow == 3
        blocked = threads.submit(lambda: "next")
        assert blocked.cancel()
        stuck.set()
        assert [future.result(60) for future in waiting] == ["done"] * 5
        assert threads.submit(lambda: "after").result(60) == "after"
    assert not [thread for thread in threading.enumerate() if thread.name == "decode"]


async def test_the_other_files_of_a_request_with_a_bad_one_are_decoded():
    with decoder() as (images, _):
        good, bad, again = await images.decode_each([SMALL, b"no image", SMALL], STEPS)
        np.testing.assert_array_equal(good, again)
        assert isinstance(bad, InvalidRequestError)
        with pytest.raises(InvalidRequestError, match=r"^image 1: image: expected a JPEG"):
            await images.decode([SMALL, b"no image", SMALL], STEPS)
