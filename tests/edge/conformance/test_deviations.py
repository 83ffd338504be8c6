"""The table of deviations is about tests that exist."""

from pathlib import Path

from tests.edge.conformance.deviations import DEVIATIONS
from tests.edge.conftest import TRANSPORTS


def test_deviations_are_of_tests() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [test for _, test in DEVIATIONS if f"def {test}(" not in source] == []
    assert {transport for transport, _ in DEVIATIONS} <= set(TRANSPORTS)
