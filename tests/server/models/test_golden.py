"""What golden samples are good for beside the check: examples."""

import numpy as np

from convoy.server.models.golden import GoldenSamples, examples


def test_examples_show_each_class_before_one_twice_and_no_large_file():
    best = [2, 2, 0, 0, 1]
    files = (b"two", b"two again", b"x" * 300_000, b"zero", b"one")
    golden = GoldenSamples(np.zeros((5, 4, 6, 3), np.uint8), np.eye(3, dtype="f4")[best], files)
    assert examples(golden, 3) == (b"two", b"zero", b"one")
    assert examples(golden, 8) == (b"two", b"zero", b"one", b"two again")
    assert examples(golden, 0) == ()
