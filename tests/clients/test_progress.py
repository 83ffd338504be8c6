"""The progress of a batch job, on a terminal and elsewhere."""

import io
import os
import pty
import re
import subprocess
import sys
from threading import Thread

from rich.console import Console

from convoy.client.batch.job import Progress
from convoy.client.cli.progress import show_progress
from tests.clients.batches import digit_files, write_images


def plain(drawn: str) -> str:
    """Everything that was drawn, erased text included, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)


def test_the_bar_shows_images_a_second_errors_and_the_time_left():
    now_s = [0.0]
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=100)
    with show_progress(console, lambda: now_s[0]) as show:
        for second in range(5):
            now_s[0] = second
            show(Progress(images=100 * (second + 1), errors=second, total=1000))
    assert "500/1000 100 images/s, 4 errors 0:00:05" in plain(drawn.getvalue())


def test_without_a_terminal_there_is_a_line_every_ten_seconds(capsys):
    drawn = io.StringIO()
    times_s = iter([0.0, 5.0, 11.0, 12.0, 30.0])
    with show_progress(Console(file=drawn), lambda: next(times_s)) as show:
        for images, errors in ((100, 0), (220, 1), (240, 1), (1000, 2)):
            show(Progress(images, errors, 2000))
    assert not drawn.getvalue()
    assert capsys.readouterr().err.splitlines() == [
        "220 of 2000 images, 1 errors, 11 images/s, 163 s left",
        "1000 of 2000 images, 2 errors, 41 images/s, 24 s left",
    ]


def test_a_job_on_a_terminal_draws_a_bar(repository, tmp_path):
    write_images(tmp_path / "images", digit_files(repository), 100)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "convoy.client", "batch", str(tmp_path / "images")]
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
