"""The hand-made model serves here too."""

from tests.server.conftest import publish

__all__ = ["publish"]
