"""Decode the image files of requests on threads, off the event loop; replace stuck threads."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from convoy.server.errors import DeadlineExceededError, InvalidRequestError, OverloadedError
from convoy.server.images.image_file import DecodingStoppedError, ImageFileError, decode_rgb, fit
from convoy.server.models.manifest import Interpolation, Preprocessing
from convoy.server.requests import Images

_FILTERS = {
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


def decode_image(
    encoded: bytes,
    preprocessing: Preprocessing,
    max_pixels: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Images:
    """Decode one image file and resize it to the model's size.

    Args:
        encoded: A JPEG, PNG, WebP, BMP or GIF file.
        preprocessing: The steps of the model's manifest.
        max_pixels: Larger images are rejected before their pixels are allocated.
        stopped: Called during the decoding; returns whether the deadline passed or the caller
            disconnected.

    Returns:
        `[1, height_px, width_px, 3]` RGB.

    Raises:
        InvalidRequestError: It is not such a file, damaged, or over a limit.
        DeadlineExceededError: `stopped` returned true.
        OverloadedError: There is no memory for the pixels at the moment.
    """
    size_px = (preprocessing.width_px, preprocessing.height_px)
    resampling = _FILTERS[preprocessing.interpolation]
    try:
        shorter_px, antialias = preprocessing.resize_shorter_px, preprocessing.antialias
        scaled_for = (size_px, shorter_px) if preprocessing.scaled_decoding else None
        image = decode_rgb(encoded, max_pixels, stopped, scaled_for)
        fitted = fit(image, size_px, shorter_px, resampling, antialias)
        return np.asarray(fitted)[np.newaxis]
    except ImageFileError as error:
        raise InvalidRequestError(f"image: {error}") from error
    except DecodingStoppedError:
        raise DeadlineExceededError("the deadline passed while an image was decoded") from None
    except MemoryError as error:
        raise OverloadedError("image: not enough memory to decode it at the moment") from error


def rely_on_own_pixel_limit() -> None:
    """Turn off Pillow's limit of pixels in this process, which a setting here replaces.

    Pillow warns above 89 and raises above 179 million pixels, independent of the setting.
    """
    Image.MAX_IMAGE_PIXELS = None


T = TypeVar("T")


class DecodeThreads(Generic[T]):
    """Runs jobs on threads; one that is busy for long gets a substitute.

    A single call of an image library cannot be interrupted. Its thread continues and ends
    with the call, while a substitute takes the next jobs.

    Args:
        workers: Threads that take jobs.
        slow_after_s: How long a thread may be busy with one job before it is substituted.
        max_slow: Threads that may be substituted at a time; it bounds memory.
        on_slow: Called with each substitution, to count it.
    """

    def __init__(
        self,
        workers: int,
        slow_after_s: float = 1.0,
        max_slow: int = 8,
        on_slow: Callable[[], None] = lambda: None,
    ) -> None:
        self._slow_after_s = slow_after_s
        self._max_slow = max_slow
        self._on_slow = on_slow
        self._jobs: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._busy_since_s: dict[threading.Thread, float] = {}
        self._slow: set[threading.Thread] = set()
        self._workers: set[threading.Thread] = set()
        for _ in range(workers):
            self._add_worker()

    @property
    def slow(self) -> int:
        """Threads that were substituted and still run their job."""
        return len(self._slow)

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Queue a job; its future can be cancelled until a thread takes it."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def substitute_slow(self) -> None:
        """Start a thread for each one that is busy for too long; call this while jobs wait."""
        now_s = time.monotonic()
        with self._lock:
            for thread in list(self._workers):
                since_s = self._busy_since_s.get(thread, now_s)
                if now_s - since_s > self._slow_after_s and len(self._slow) < self._max_slow:
                    self._workers.discard(thread)
                    self._slow.add(thread)
                    self._add_worker()
                    self._on_slow()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the threads end once the queue is empty, and wait for them at most `timeout_s`."""
        with self._lock:
            threads = [*self._workers, *self._slow]
            for _ in self._workers:
                self._jobs.put(None)
        end_s = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _add_worker(self) -> None:
        # A daemon: the process may end during a library's call.
        thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._workers.add(thread)
        thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while job := self._jobs.get():
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            self._busy_since_s[me] = time.monotonic()
            _settle(future, work)
            del future, work, job  # otherwise the last file would stay in memory
            with self._lock:
                del self._busy_since_s[me]
                if me in self._slow:
                    self._slow.discard(me)
                    return


def _settle(future: "Future[T]", work: Callable[[], T]) -> None:
    # The future may have been cancelled.
    with contextlib.suppress(InvalidStateError):
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)


Decoded = list[Images | InvalidRequestError]

_WATCH_EVERY_S = 0.5
_PASSED = "the deadline passed while the images were decoded"


@dataclass(slots=True)
class _Run:
    """Files that one thread decodes, one after the other.

    Attributes:
        queued_at_s: When it began to wait for a thread.
        wanted: Returns whether somebody still waits for the result.
        begun_at_s: When a thread took it; None while it waits.
    """

    files: Sequence[bytes]
    steps: Preprocessing
    max_pixels: int
    deadline_s: float
    queued_at_s: float
    wanted: bool = True
    begun_at_s: float | None = None

    def decode(self) -> Decoded:
        """Decode all of them.

        Raises:
            DeadlineExceededError: The deadline passed, or no caller waits any more.
            OverloadedError: There is no memory for the pixels.
        """
        self.begun_at_s = time.monotonic()
        return [self._decode_one(file) for file in self.files]

    def queued_s(self, now_s: float) -> float:
        """Return how long it waited for a thread, so far if it still does."""
        return (self.begun_at_s or now_s) - self.queued_at_s

    def _decode_one(self, file: bytes) -> Images | InvalidRequestError:
        if self._stopped():
            raise DeadlineExceededError(_PASSED)
        try:
            return decode_image(file, self.steps, self.max_pixels, self._stopped)
        except InvalidRequestError as error:
            # The traceback would keep the file in memory.
            return error.with_traceback(None)

    def _stopped(self) -> bool:
        return not self.wanted or time.monotonic() > self.deadline_s


# Takes the duration of a request's decoding and the part of it that its files waited for a thread.
OnDecoded = Callable[[float, float], None]


def _ignore(duration_s: float, queued_s: float) -> None:
    """Count nothing."""


class ImageDecoder:
    """Decodes image files and resizes them to a model's size.

    Args:
        threads: Run the decoding.
        workers: How many threads there are; a request's files are spread over them.
        max_pixels: Larger images are rejected before their pixels are allocated.
        max_waiting: Files that may be decoded or wait at once; further requests are rejected.

    `decode` and `decode_each` belong to one event loop.
    """

    def __init__(
        self, threads: DecodeThreads[Decoded], workers: int, max_pixels: int, max_waiting: int
    ) -> None:
        self._threads = threads
        self._workers = workers
        self._max_pixels = max_pixels
        self._max_waiting = max_waiting
        self._waiting = 0
        self._lock = threading.Lock()
        self._watch: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int:
        """Files that wait for a thread or are being decoded."""
        return self._waiting

    async def decode(
        self,
        files: Sequence[bytes],
        steps: Preprocessing,
        deadline_s: float = float("inf"),
        on_decoded: OnDecoded = _ignore,
    ) -> Images:
        """Decode all files of a request, which fails with the first that cannot be decoded.

        Args:
            files: The files.
            steps: How they become pixels.
            deadline_s: On the clock `time.monotonic`.
            on_decoded: Called once with the times, whether or not the request fails.

        Returns:
            `[N, height_px, width_px, 3]` RGB.

        Raises:
            InvalidRequestError: A file is not an image, damaged, or too large; if there are
                several, the message names its index.
            DeadlineExceededError: The deadline passed meanwhile.
            OverloadedError: Too many files wait, or there is no memory for the pixels.
        """
        decoded = await self.decode_each(files, steps, deadline_s, on_decoded)
        for index, result in enumerate(decoded):
            if isinstance(result, InvalidRequestError):
                if len(files) == 1:
                    raise result
                raise InvalidRequestError(f"image {index}: {result}")
        return np.concatenate([result for result in decoded if isinstance(result, np.ndarray)])

    async def decode_each(
        self,
        files: Sequence[bytes],
        steps: Preprocessing,
        deadline_s: float = float("inf"),
        on_decoded: OnDecoded = _ignore,
    ) -> Decoded:
        """Decode the files of a request, each to `[1, height_px, width_px, 3]` or to its error.

        Args:
            files: The files; without any the times are not counted.
            steps: As of `decode`.
            deadline_s: As of `decode`.
            on_decoded: As of `decode`.

        Raises:
            DeadlineExceededError: The deadline passed meanwhile.
            OverloadedError: Too many files wait, or there is no memory for the pixels.
        """
        if not files:
            return []
        if self._waiting + len(files) > self._max_waiting:
            raise OverloadedError(
                f"{self._waiting} of {self._max_waiting} images wait for their decoding, the "
                f"request has {len(files)}"
            )
        # Every worker gets several files: a hand-over to a thread costs as much as a small image.
        size = -(-len(files) // self._workers)
        now_s = time.monotonic()
        runs = [
            _Run(files[start : start + size], steps, self._max_pixels, deadline_s, now_s)
            for start in range(0, len(files), size)
        ]
        try:
            # The threads check the deadline too, but not within a call of an image library.
            async with asyncio.timeout(_remaining_s(deadline_s)):
                results = await asyncio.gather(*map(self._submit, runs))
        except TimeoutError:
            raise DeadlineExceededError(_PASSED) from None
        finally:
            ended_s = time.monotonic()
            for run in runs:
                run.wanted = False
            on_decoded(ended_s - now_s, max(run.queued_s(ended_s) for run in runs))
        return [result for run in results for result in run]

    def _submit(self, run: "_Run") -> "asyncio.Future[Decoded]":
        loop = asyncio.get_running_loop()
        future = self._threads.submit(run.decode)
        self._count(len(run.files))
        # Only when the thread is done: files without a waiting caller use memory too.
        future.add_done_callback(lambda _: self._count(-len(run.files)))
        if self._watch is None:
            self._watch = loop.call_later(_WATCH_EVERY_S, self._look)
        return asyncio.wrap_future(future)

    def _count(self, files: int) -> None:
        with self._lock:
            self._waiting += files

    def _look(self) -> None:
        self._threads.substitute_slow()
        again = asyncio.get_running_loop().call_later
        self._watch = again(_WATCH_EVERY_S, self._look) if self._waiting else None


def _remaining_s(deadline_s: float) -> float | None:
    return None if deadline_s == float("inf") else deadline_s - time.monotonic()
