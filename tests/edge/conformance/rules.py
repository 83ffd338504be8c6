"""A rule of a specification as a test, and what it lets a server do."""

from collections.abc import Callable, Collection

import pytest

from tests.edge.conformance.deviations import DEVIATIONS, VARIES

Provoke = Callable[..., str]
OK = frozenset({"grpc-status 0"})
IGNORED = frozenset({"ignored"})


def connection_error(code: str) -> frozenset[str]:
    """What a connection error may look like; GOAWAY only SHOULD come (RFC 9113, section 5.4.1)."""
    return frozenset({f"GOAWAY {code}", "closed"})


def stream_error(code: str) -> frozenset[str]:
    """What a stream error may look like; it may end the connection, too (section 5.4.2)."""
    return connection_error(code) | {f"RST_STREAM {code}"}


# A response may come before the reset of a malformed request (RFC 9113, section 8.1.1).
MALFORMED = stream_error("PROTOCOL_ERROR") | {"HTTP 400"}


def judge(transport: str, test: str, outcome: str, allowed: Collection[str]) -> None:
    """Fail unless an outcome is allowed, or else the one that `DEVIATIONS` has for the test."""
    deviation = DEVIATIONS.get((transport, test))
    if deviation is None:
        assert outcome in allowed, f"{outcome!r}, not one of {sorted(allowed)}"
    else:
        assert outcome not in allowed, f"{test} conforms now: take it out of DEVIATIONS"
        assert outcome == deviation.outcome, deviation.reason


def rule(section: str, allowed: Collection[str]) -> Callable[[Provoke], Provoke]:
    """Make a test of a function that returns what a server did.

    Args:
        section: Such as "RFC9113-5.1"; part of the test's id.
        allowed: The outcomes that the section permits, in the words of `Http2Client.outcome`.
    """

    def decorate(provoke: Provoke) -> Provoke:
        @pytest.mark.parametrize("section", [section])
        def test(client: object, transport: str, section: str) -> None:
            deviation = DEVIATIONS.get((transport, provoke.__name__))
            if deviation and deviation.outcome == VARIES:
                pytest.skip(deviation.reason)
            judge(transport, provoke.__name__, provoke(client), allowed)

        test.__name__ = provoke.__name__
        test.__doc__ = provoke.__doc__
        return test

    return decorate
