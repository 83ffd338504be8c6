"""Versions that were found bad: refused once, in one line and a metric, until a file changes."""

from dataclasses import dataclass
from pathlib import Path

import structlog

from server.errors import StartupError
from server.metrics import ModelMetrics
from server.repository import Fingerprint, fingerprint

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a version is not served.

    Attributes:
        folder: NAME/VERSION.
        files: What its files looked like before they were read.
    """

    folder: Path
    error: StartupError
    files: Fingerprint


class Refusals:
    """Remembers refused versions, and repeats no complaint."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._refusals: dict[Path, Refusal] = {}
        self._complaints: dict[str, str] = {}

    def get(self, folder: Path) -> Refusal | None:
        """Returns the refusal of a version."""
        return self._refusals.get(folder)

    def still_holds(self, folder: Path) -> bool:
        """True where a version was refused and its files have not changed since."""
        known = self._refusals.get(folder)
        return known is not None and known.files == fingerprint(folder)

    def add(self, refusal: Refusal) -> None:
        """Notes a refusal; it is not logged yet."""
        self._refusals[refusal.folder] = refusal

    def report(self, refusal: Refusal) -> None:
        """Logs and counts a refusal."""
        folder, error = refusal.folder, refusal.error
        self._metrics.refused(folder.parent.name, error.reason)
        logger.error(
            "version refused",
            model=folder.parent.name,
            version=int(folder.name),
            reason=error.reason,
            error=str(error),
        )

    def withdraw(self, folder: Path) -> None:
        """Forgets the refusal of a version, so that it is tried again."""
        self._refusals.pop(folder, None)

    def withdraw_all(self, model: Path) -> None:
        """Forgets those of a model."""
        for folder in [folder for folder in self._refusals if folder.parent == model]:
            del self._refusals[folder]

    def complain(self, model: str, error: StartupError) -> None:
        """Logs, once, why a model (by the empty name: the repository) cannot be looked at."""
        if self._complaints.get(model) != str(error):
            self._complaints[model] = str(error)
            self._metrics.refused(model, error.reason)
            logger.error("repository refused", model=model, reason=error.reason, error=str(error))

    def settle(self, model: str) -> None:
        """What was complained about is in order again."""
        self._complaints.pop(model, None)
