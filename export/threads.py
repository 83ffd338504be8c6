"""How many threads the proof runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs nets on one thread.

    The threads of a small net's layers spend their time waiting for each other as soon as another
    process wants a core: measured, a proof of seconds then takes minutes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
