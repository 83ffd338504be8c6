"""The reaction of a batcher to device faults: probes instead of requests, smaller batches.

Both end after a while, since most faults are temporary: another process took the memory, or the
driver reset the device.
"""

from enum import Enum

# A probe runs after this many failed batches in a row: their requests may be at fault.
_SUSPICIOUS_FAILURES = 3
_FIRST_PROBE_S = 1.0
_LAST_PROBE_S = 30.0
# How long batches stay small after one did not fit, until they may be twice as large.
FIRST_STEP_S = 60.0
LAST_STEP_S = 960.0
_NEVER = float("inf")


class Health(Enum):
    """Whether a model works at the moment."""

    HEALTHY = "healthy"
    # Every run fails.
    FAILING = "failing"
    # A run on the device does not end.
    HUNG = "hung"


class DeviceHealth:
    """Tell whether a model fails every run on a device, by its runs and by probes.

    Requests may cause a good model to fail. Therefore, after some failed batches in a row, a probe
    decides, a run that no request can influence. While probes fail the device gets no
    batches, and probes follow at growing intervals.

    Attributes:
        failing: Whether the last probe failed.
        probe_at_s: When the next probe is due; infinity while none is needed or one runs.
        error: The last error of a run; empty while runs succeed.
    """

    def __init__(self) -> None:
        self.failing = False
        self.probe_at_s = _NEVER
        self.error = ""
        self._failures = 0
        self._probing = False
        self._interval_s = 0.0

    def succeeded(self) -> None:
        """Note a batch, or part of one, that the model ran."""
        self._failures = 0
        if not self.failing:
            # A probe in progress may still fail.
            self.probe_at_s = _NEVER
            self.error = ""

    def failed(self, error: str, now_s: float) -> None:
        """Note a batch that the model failed on as a whole."""
        self.error = error
        self._failures += 1
        if self._failures >= _SUSPICIOUS_FAILURES and not (self.failing or self._probing):
            self.probe_at_s = min(self.probe_at_s, now_s)

    def begin_probe(self) -> None:
        """Note that a probe runs."""
        self._probing = True
        self.probe_at_s = _NEVER

    def probed(self, error: str, now_s: float) -> None:
        """Note the result of the probe; an empty error stands for success."""
        self._probing = False
        self._failures = 0
        self.error = error
        self.failing = bool(error)
        if not error:
            self.probe_at_s = _NEVER
            self._interval_s = 0.0
            return
        self._interval_s = min(max(_FIRST_PROBE_S, 2 * self._interval_s), _LAST_PROBE_S)
        self.probe_at_s = now_s + self._interval_s


class BatchCeiling:
    """The largest batch to run, which falls when one does not fit into a device's memory.

    It stays low for a step and then doubles with each further step. If it falls again before it was
    at its full size for a step, the memory remains short, and the steps grow.

    Args:
        full_size: The largest batch while the memory suffices, in images.
    """

    def __init__(self, full_size: int) -> None:
        self._full_size = self._low_size = full_size
        self._lowered_at_s = 0.0
        self._step_s = FIRST_STEP_S

    def size(self, now_s: float) -> int:
        """Return the largest batch to run now, in images."""
        if self._low_size == self._full_size:
            return self._full_size
        steps = max(0, int((now_s - self._lowered_at_s) / self._step_s))
        return min(self._full_size, self._low_size << min(steps, self._full_size.bit_length()))

    def grows_at_s(self, now_s: float) -> float:
        """Return when the size grows next; infinity while it is full."""
        if self.size(now_s) == self._full_size:
            return _NEVER
        steps = int((now_s - self._lowered_at_s) / self._step_s)
        return self._lowered_at_s + (steps + 1) * self._step_s

    def lower(self, size: int, now_s: float) -> None:
        """Note that no larger batch than this fits at the moment; a larger size changes nothing."""
        before = self.size(now_s)
        if size >= before:
            return
        grown = before > self._low_size
        recovered = self._is_full_for_a_step(now_s)
        if recovered:
            self._step_s = FIRST_STEP_S
        elif grown:
            self._step_s = min(2 * self._step_s, LAST_STEP_S)
        self._low_size = max(1, size)
        self._lowered_at_s = now_s

    def _is_full_for_a_step(self, now_s: float) -> bool:
        return self.size(now_s - self._step_s) == self._full_size
