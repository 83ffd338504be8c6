"""The progress of a batch job: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from convoy.client.batch.job import Clock, Progress

_LINE_EVERY_S = 10.0


@contextmanager
def show_progress(
    console: Console, clock: Clock = time.monotonic
) -> Iterator[Callable[[Progress], None]]:
    """Show images, images/s, errors and the time that is left.

    Args:
        console: Where the bar is drawn, or lines are written; the bar is gone at the end.
        clock: Monotonic seconds.
    """
    if not console.is_terminal:
        yield _Lines(clock)
        return
    bar = ProgressBar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s, {task.fields[errors]} errors"),
        TimeRemainingColumn(),
        console=console,
        get_time=clock,
        transient=True,
    )
    with bar:
        task = bar.add_task("images", total=None, rate="-", errors=0)

        def show(progress: Progress) -> None:
            speed = bar.tasks[task].speed
            bar.update(
                task,
                completed=progress.images,
                total=progress.total,
                errors=progress.errors,
                rate=f"{speed:.0f}" if speed else "-",
            )

        yield show


class _Lines:
    """Write a line to stderr at most every ten seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_s = clock()
        self._images: int | None = None

    def __call__(self, progress: Progress) -> None:
        now_s = self._clock()
        if self._images is None:
            self._images = progress.images
        if now_s - self._last_s < _LINE_EVERY_S:
            return
        rate_per_s = (progress.images - self._images) / (now_s - self._last_s)
        left = (
            f", {(progress.total - progress.images) / rate_per_s:.0f} s left" if rate_per_s else ""
        )
        print(
            f"{progress.images} of {progress.total} images, {progress.errors} errors, "
            f"{rate_per_s:.0f} images/s{left}",
            file=sys.stderr,
        )
        self._last_s, self._images = now_s, progress.images
