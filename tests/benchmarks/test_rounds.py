"""Rounds count only where other work left the machine alone."""

from contextlib import nullcontext

from benchmarks.rounds import Turns, by_candidate


def _run(other_cores: float, number: int) -> dict[str, float]:
    return {"other_cores": other_cores, "number": number}


def test_disturbed_rounds_are_made_again():
    disturbed = {0, 2}
    asked = []

    def ours(load: str, number: int) -> dict[str, float]:
        asked.append((load, number))
        return _run(0.5 if load == "8" and number in disturbed else 0.0, number)

    up = nullcontext({"ours": ours, "theirs": lambda _, number: _run(0.1, number)})
    found = Turns(rounds=2, tries=3, calm_cores=0.2).take(["8", "32"], lambda: up)

    assert [each["ours"]["number"] for each in found["8"]] == [1, 3]
    assert [each["ours"]["number"] for each in found["32"]] == [0, 1]
    # A load that has its rounds is not measured again.
    assert asked == [("8", 0), ("32", 0), ("8", 1), ("32", 1), ("8", 2), ("8", 3)]


def test_a_round_counts_only_if_none_of_its_candidates_was_disturbed():
    up = nullcontext(
        {"ours": lambda *_: _run(0.0, 0), "theirs": lambda _, n: _run(0.9 - 0.1 * n, n)}
    )
    found = Turns(rounds=2, tries=2, calm_cores=0.2).take(["8"], lambda: up)
    # None was calm: the calmest of the four are all there is.
    assert [each["theirs"]["number"] for each in found["8"]] == [3, 2]


def test_no_round_begins_after_the_limit():
    up = nullcontext({"ours": lambda _, number: _run(0.0, number)})
    assert len(Turns(rounds=5, limit_s=0.0).take(["8"], lambda: up)["8"]) <= 1


def test_runs_of_a_candidate_keep_the_order_of_the_rounds():
    rounds = [{"ours": _run(0, n), "theirs": _run(0, 10 + n)} for n in range(3)]
    runs = by_candidate({"8": rounds})
    assert [run["number"] for run in runs["ours"]["8"]] == [0, 1, 2]
    assert [run["number"] for run in runs["theirs"]["8"]] == [10, 11, 12]
