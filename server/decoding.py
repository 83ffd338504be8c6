"""Decodes the image files of requests on threads, off the event loop."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from server.errors import DeadlineExceededError, InvalidRequestError, OverloadedError
from server.images import decode_image
from server.manifest import Preprocessing
from server.requests import Images


class ImageDecoder:
    """Brings image files to a model's size.

    Args:
        threads: Run the decoding.
        workers: How many threads there are; a request's files are spread over them.
        max_pixels: Larger pictures are refused before their pixels are allocated.
        max_waiting: Files that may be in hand at once; a request beyond them is refused.

    `decode` and `decode_each` belong to one event loop.
    """

    def __init__(self, threads: Executor, workers: int, max_pixels: int, max_waiting: int) -> None:
        self._threads = threads
        self._workers = workers
        self._max_pixels = max_pixels
        self._max_waiting = max_waiting
        self._waiting = 0

    async def decode(
        self, files: Sequence[bytes], steps: Preprocessing, deadline_s: float = float("inf")
    ) -> Images:
        """Decodes all files of a request, which fails with the first that cannot be decoded.

        Returns:
            `[N, height_px, width_px, 3]` RGB.

        Raises:
            InvalidRequestError: A file is no image, damaged, or too large; it is named by its place
                where there are several.
            DeadlineExceededError: The deadline, on the clock `time.monotonic`, passed meanwhile.
            OverloadedError: Too many files wait.
        """
        decoded = await self.decode_each(files, steps, deadline_s)
        for index, result in enumerate(decoded):
            if isinstance(result, InvalidRequestError):
                if len(files) == 1:
                    raise result
                raise InvalidRequestError(f"image {index}: {result}")
        return np.concatenate([result for result in decoded if isinstance(result, np.ndarray)])

    async def decode_each(
        self, files: Sequence[bytes], steps: Preprocessing, deadline_s: float = float("inf")
    ) -> list[Images | InvalidRequestError]:
        """Decodes the files of a request, each to `[1, height_px, width_px, 3]` or to its error.

        Raises:
            DeadlineExceededError: The deadline, on the clock `time.monotonic`, passed meanwhile.
            OverloadedError: Too many files wait.
        """
        if self._waiting + len(files) > self._max_waiting:
            raise OverloadedError(
                f"{self._waiting} of {self._max_waiting} images wait for their decoding, the "
                f"request brings {len(files)}"
            )
        self._waiting += len(files)
        try:
            # Every worker gets one run of files: a hop to a thread costs as much as a small image.
            size = -(-len(files) // self._workers)
            runs = [files[start : start + size] for start in range(0, len(files), size)]
            loop = asyncio.get_running_loop()
            results = await asyncio.gather(
                *(
                    loop.run_in_executor(self._threads, self._run, run, steps, deadline_s)
                    for run in runs
                )
            )
        finally:
            self._waiting -= len(files)
        return [result for run in results for result in run]

    def _run(
        self, files: Sequence[bytes], steps: Preprocessing, deadline_s: float
    ) -> list[Images | InvalidRequestError]:
        results: list[Images | InvalidRequestError] = []
        for file in files:
            if time.monotonic() > deadline_s:
                raise DeadlineExceededError("the deadline passed while the images were decoded")
            try:
                results.append(decode_image(file, steps, self._max_pixels))
            except InvalidRequestError as error:
                results.append(error)
        return results
