"""Which versions of a model are served: the setting and the policy file decide."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

_POLICY = re.compile(r"(?P<kind>latest|all|specific)(:(?P<count>[1-9][0-9]{0,3}))?")


class PolicyKind(Enum):
    """The ways to choose versions; the values are those of --version-policy."""

    LATEST = "latest"
    ALL = "all"
    SPECIFIC = "specific"


@dataclass(frozen=True, slots=True)
class Promotion:
    """The content of a model's policy.json.

    Attributes:
        version: The version to serve.
        previous: The versions promoted before it, oldest first.
    """

    version: int
    previous: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Versions in the order in which they are loaded.

    Attributes:
        default: The first of them that loads answers requests that name no version.
        fallback: Loaded only while no version of the model is served.
        newest_first: All versions.
        others: How many versions are served besides the default.
        newer_too: Whether these may be newer than the default.
    """

    default: tuple[int, ...]
    fallback: tuple[int, ...]
    newest_first: tuple[int, ...]
    others: int
    newer_too: bool

    def beside(self, default: int) -> list[int]:
        """Return the versions that may be served besides the default, in the order to load."""
        if not self.others:
            return []
        return [v for v in self.newest_first if v < default or (self.newer_too and v != default)]


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """The setting: `latest:N` (the default version and the N - 1 before it), `all` or `specific`.

    The default version is the promoted one, or the newest where none was promoted. `specific`
    serves the promoted version and nothing else.
    """

    kind: PolicyKind = PolicyKind.LATEST
    count: int = 1

    @staticmethod
    def parse(text: str) -> "VersionPolicy":
        """Parse a setting.

        Raises:
            ValueError: It is none of these.
        """
        match = _POLICY.fullmatch(text)
        if not match or (match["count"] and match["kind"] != "latest"):
            raise ValueError(f"expected latest, latest:N, all or specific, got {text!r}")
        return VersionPolicy(PolicyKind(match["kind"]), int(match["count"] or 1))

    def plan(self, available: Sequence[int], promotion: Promotion | None) -> ServingPlan:
        """Return the existing versions in the order to load them."""
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
