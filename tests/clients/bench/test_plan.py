"""The sending times of an open loop."""

import itertools

import numpy as np
import pytest

from convoy.client.bench import BenchError
from convoy.client.bench.plan import Constant, Poisson, Share, Trace

PARTS = [Share(index, 3) for index in range(3)]


def until(arrivals, end_s, share=None):
    return list(itertools.takewhile(lambda t: t < end_s, arrivals.times_s(share or Share())))


def test_constant_arrivals_are_even_and_their_parts_are_the_whole():
    whole = until(Constant(50), 10)
    assert whole == pytest.approx(np.arange(500) / 50)
    parts = [until(Constant(50), 10, part) for part in PARTS]
    assert sorted(itertools.chain(*parts)) == whole


def test_poisson_arrivals_have_exponential_gaps_at_the_rate():
    gaps_s = np.diff(until(Poisson(200, seed=1), 100))
    # 20,000 gaps: six standard errors of the mean and of the coefficient of variation.
    assert gaps_s.mean() == pytest.approx(1 / 200, rel=6 / np.sqrt(20_000))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1, rel=6 / np.sqrt(20_000))
    assert abs(np.corrcoef(gaps_s[1:], gaps_s[:-1])[0, 1]) < 6 / np.sqrt(20_000)


def test_the_parts_of_poisson_arrivals_differ_and_sum_to_the_rate():
    parts = [until(Poisson(300), 50, part) for part in PARTS]
    assert sum(map(len, parts)) == pytest.approx(15_000, rel=6 / np.sqrt(15_000))
    assert len({part[0] for part in parts}) == 3
    assert parts[0] == until(Poisson(300), 50, PARTS[0])
    assert parts[0] != until(Poisson(300, seed=1), 50, PARTS[0])


def test_a_trace_is_played_back_from_its_first_arrival(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("time_s,path\n100.5,/a\n100.75,/b\n100.75,/c\n102.5,/d\n")
    trace = Trace.read(file)
    assert list(trace.times_s(Share())) == [0, 0.25, 0.25, 2]
    assert [list(trace.times_s(part)) for part in PARTS] == [[0, 2], [0.25], [0.25]]
    assert trace.rate_per_s == 1.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least two"),
        ("time_s\n1\n", "at least two"),
        ("1\n1\n", "and rising"),
        ("1\nnan\n", "row 2: expected seconds, got 'nan'"),
        ("1\n3\n2\n4\n", "2 comes after 3"),
    ],
)
def test_an_invalid_trace_is_rejected(tmp_path, text, words):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(BenchError, match=words):
        Trace.read(file)


def test_a_missing_trace_is_rejected(tmp_path):
    with pytest.raises(BenchError, match=r"no\.csv"):
        Trace.read(tmp_path / "no.csv")
