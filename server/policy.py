"""Which of a model's versions are served: the setting, and the file that promote writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

_POLICY = re.compile(r"(?P<kind>latest|all|specific)(:(?P<count>[1-9][0-9]{0,3}))?")


class PolicyKind(Enum):
    """How versions are chosen; the values are those of --version-policy."""

    LATEST = "latest"
    ALL = "all"
    SPECIFIC = "specific"


@dataclass(frozen=True, slots=True)
class Promotion:
    """What a model's policy.json says.

    Attributes:
        version: The one to serve.
        previous: Those promoted before, oldest first.
    """

    version: int
    previous: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Versions in the order in which they are tried.

    Attributes:
        default: The first good one answers requests that name no version.
        fallback: Tried only while nothing of the model is served.
        newest_first: All there are.
        others: How many are served beside the default.
        newer_too: Whether those may be newer than the default.
    """

    default: tuple[int, ...]
    fallback: tuple[int, ...]
    newest_first: tuple[int, ...]
    others: int
    newer_too: bool

    def beside(self, default: int) -> list[int]:
        """Returns the versions that may be served beside the default, in the order to try."""
        if not self.others:
            return []
        return [v for v in self.newest_first if v < default or (self.newer_too and v != default)]


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """The setting: `latest:N` (the default version and the N - 1 before it), `all` or `specific`.

    The default version is the one that was promoted, or the newest. `specific` serves what was
    promoted and nothing else.
    """

    kind: PolicyKind = PolicyKind.LATEST
    count: int = 1

    @staticmethod
    def parse(text: str) -> "VersionPolicy":
        """Reads a setting.

        Raises:
            ValueError: It is none of the three.
        """
        match = _POLICY.fullmatch(text)
        if not match or (match["count"] and match["kind"] != "latest"):
            raise ValueError(f"expected latest, latest:N, all or specific, got {text!r}")
        return VersionPolicy(PolicyKind(match["kind"]), int(match["count"] or 1))

    def plan(self, available: Sequence[int], promotion: Promotion | None) -> ServingPlan:
        """Puts the versions that exist in order."""
        newest_first = tuple(sorted(available, reverse=True))
        others = {
            PolicyKind.LATEST: self.count - 1,
            PolicyKind.ALL: len(newest_first),
            PolicyKind.SPECIFIC: 0,
        }[self.kind]
        newer_too = self.kind is PolicyKind.ALL
        if promotion is None:
            default = () if self.kind is PolicyKind.SPECIFIC else newest_first
            return ServingPlan(default, (), newest_first, others, newer_too)
        before = [v for v in reversed(promotion.previous) if v in newest_first]
        older = [v for v in newest_first if v < promotion.version]
        return ServingPlan(
            default=(promotion.version,),
            fallback=tuple(dict.fromkeys([*before, *older])),
            newest_first=newest_first,
            others=others,
            newer_too=newer_too,
        )
