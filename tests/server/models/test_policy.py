"""Which versions are tried, in which order."""

import pytest

from convoy.server.models.policy import Promotion, VersionPolicy

VERSIONS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "promotion", "default", "beside"),
    [
        ("latest", None, (5, 4, 3, 2, 1), ([], 0)),
        ("latest:1", None, (5, 4, 3, 2, 1), ([], 0)),
        ("latest:3", None, (5, 4, 3, 2, 1), ([4, 3, 2, 1], 2)),
        ("latest:3", Promotion(3), (3,), ([2, 1], 2)),
        ("all", None, (5, 4, 3, 2, 1), ([4, 3, 2, 1], 5)),
        ("all", Promotion(3), (3,), ([5, 4, 2, 1], 5)),
        ("specific", None, (), ([], 0)),
        ("specific", Promotion(3), (3,), ([], 0)),
    ],
)
def test_a_plan_puts_versions_in_order(text, promotion, default, beside):
    plan = VersionPolicy.parse(text).plan(VERSIONS, promotion)
    assert plan.default == default
    if default:
        assert (plan.beside(default[0]), plan.others) == beside


def test_without_the_promoted_version_the_one_promoted_before_is_next():
    plan = VersionPolicy.parse("latest:1").plan(VERSIONS, Promotion(4, previous=(5, 2, 9)))
    assert plan.default == (4,)
    assert plan.fallback == (2, 5, 3, 1)


@pytest.mark.parametrize("text", ["", "newest", "latest:0", "latest:-1", "all:2", "specific:1"])
def test_another_policy_is_an_error(text):
    with pytest.raises(ValueError, match="expected latest, latest:N, all or specific"):
        VersionPolicy.parse(text)
