"""How far a batch job is, as a bar on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from clients.batch.job import Clock, Progress


@contextmanager
def progress_bar(
    console: Console, clock: Clock = time.monotonic
) -> Iterator[Callable[[Progress], None]]:
    """Shows images, images/s, errors and the time that is left; nothing where there is no terminal.

    Args:
        console: Where the bar is drawn; it is gone at the end.
        clock: Seconds that only grow.
    """
    bar = ProgressBar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s, {task.fields[errors]} errors"),
        TimeRemainingColumn(),
        console=console,
        get_time=clock,
        transient=True,
        disable=not console.is_terminal,
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
