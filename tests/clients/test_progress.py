"""The progress bar of a batch job."""

import io
import os
import pty
import re
import subprocess
import sys
from threading import Thread

from rich.console import Console

from clients.batch.job import Progress
from clients.cli.progress import progress_bar
from tests.clients.batches import digit_files, write_images


def plain(drawn: str) -> str:
    """Everything that was drawn, also what was rubbed out again, without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)


def test_the_bar_shows_images_a_second_errors_and_the_time_left():
    now_s = [0.0]
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=100)
    with progress_bar(console, lambda: now_s[0]) as show:
        for second in range(5):
            now_s[0] = second
            show(Progress(images=100 * (second + 1), errors=second, total=1000))
    assert "500/1000 100 images/s, 4 errors 0:00:05" in plain(drawn.getvalue())


def test_without_a_total_there_is_no_time_left():
    drawn = io.StringIO()
    with progress_bar(Console(file=drawn, force_terminal=True, width=100)) as show:
        show(Progress(images=7, errors=0, total=None))
    assert "7/? - images/s, 0 errors" in plain(drawn.getvalue())


def test_nothing_is_drawn_where_there_is_no_terminal():
    drawn = io.StringIO()
    with progress_bar(Console(file=drawn)) as show:
        show(Progress(images=7, errors=0, total=10))
    assert not drawn.getvalue()


def test_a_job_on_a_terminal_draws_its_bar(repository, tmp_path):
    write_images(tmp_path / "images", digit_files(repository), 100)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "clients", "batch", str(tmp_path / "images")]
    command += ["--out", str(tmp_path / "out.csv")]
    command += ["--engine", "local", "--repository", str(repository)]
    ours, terminal = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        # The end of a terminal is an error on Linux.
        try:
            while chunk := os.read(ours, 4096):
                chunks.append(chunk)
        except OSError:
            pass

    reader = Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        command, stderr=terminal, stdout=subprocess.PIPE, timeout=100, env=environment, check=False
    )
    os.close(terminal)
    reader.join()
    os.close(ours)
    text = plain(b"".join(chunks).decode())
    assert done.returncode == 0, text
    assert "101/101" in text
    assert "images/s, 1 errors" in text
