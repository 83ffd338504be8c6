"""The state machines of recovery, with the test's clock, against simple ones that step by step."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from convoy.server.batching.recovery import FIRST_STEP_S, LAST_STEP_S, BatchCeiling, DeviceHealth

NEVER = float("inf")
FAILURES_UNTIL_PROBE = 3
LONGEST_INTERVAL_S = 30.0


class DeviceHealthMachine(RuleBasedStateMachine):
    """Batches and probes succeed and fail in any order, several batches at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.device = DeviceHealth()
        self.failures = 0
        self.probing = False
        # The results of the probes so far.
        self.probes: list[bool] = []

    @rule(passed_s=st.integers(0, 40))
    def time_passes(self, passed_s: int) -> None:
        self.now_s += passed_s

    @rule()
    def a_batch_succeeds(self) -> None:
        self.device.succeeded()
        self.failures = 0

    @rule()
    def a_batch_fails(self) -> None:
        self.device.failed("RuntimeError: no", self.now_s)
        self.failures += 1

    @precondition(lambda self: self.device.probe_at_s <= self.now_s)
    @rule()
    def a_probe_begins(self) -> None:
        assert not self.probing
        self.device.begin_probe()
        self.probing = True

    @precondition(lambda self: self.probing)
    @rule(succeeds=st.booleans())
    def a_probe_ends(self, succeeds: bool) -> None:
        self.device.probed("" if succeeds else "RuntimeError: no", self.now_s)
        self.probing = False
        self.failures = 0
        self.probes.append(succeeds)

    @invariant()
    def the_last_probe_decides(self) -> None:
        assert self.device.failing is (bool(self.probes) and not self.probes[-1])

    @invariant()
    def a_probe_is_due_when_it_is_needed_and_one_at_a_time(self) -> None:
        due_s = self.device.probe_at_s
        if self.probing:
            assert due_s == NEVER
        elif self.device.failing:
            assert due_s - self.now_s <= LONGEST_INTERVAL_S
        else:
            assert (due_s <= self.now_s) is (self.failures >= FAILURES_UNTIL_PROBE)

    @invariant()
    def a_device_that_fails_says_why(self) -> None:
        assert self.device.error or not self.device.failing

    def teardown(self) -> None:
        """From here on the device works: it is healthy after one probe."""
        if not self.probing and self.device.failing:
            self.now_s = max(self.now_s, self.device.probe_at_s)
            self.a_probe_begins()
        if self.probing:
            self.a_probe_ends(succeeds=True)
        assert not self.device.failing


class BatchCeilingMachine(RuleBasedStateMachine):
    """Batches do not fit now and then, at whole seconds."""

    @initialize(full_size=st.integers(1, 300))
    def start(self, full_size: int) -> None:
        self.full_size = self.size = self.low = full_size
        self.now_s = self.grows_at_s = self.full_at_s = 0
        self.step_s = int(FIRST_STEP_S)
        self.ceiling = BatchCeiling(full_size)

    @rule(passed_s=st.one_of(st.integers(0, 70), st.integers(0, 3000)))
    def time_passes(self, passed_s: int) -> None:
        for _ in range(passed_s):
            self.now_s += 1
            if self.size < self.full_size and self.now_s == self.grows_at_s:
                self.size = min(2 * self.size, self.full_size)
                self.grows_at_s += self.step_s
                self.full_at_s = self.now_s

    @rule(share=st.floats(0, 1))
    def a_batch_does_not_fit(self, share: float) -> None:
        largest = max(1, int(share * self.full_size) // 2)
        self.ceiling.lower(largest, self.now_s)
        if largest >= self.size:
            return
        if self.size == self.full_size and self.now_s - self.full_at_s >= self.step_s:
            self.step_s = int(FIRST_STEP_S)
        elif self.size > self.low:
            self.step_s = min(2 * self.step_s, int(LAST_STEP_S))
        self.size = self.low = largest
        self.grows_at_s = self.now_s + self.step_s

    @invariant()
    def the_size_is_that_of_the_steps(self) -> None:
        assert self.ceiling.size(self.now_s) == self.size

    @invariant()
    def it_grows_when_it_says(self) -> None:
        at_s = self.ceiling.grows_at_s(self.now_s)
        assert at_s == (NEVER if self.size == self.full_size else self.grows_at_s)

    def teardown(self) -> None:
        """What does not happen again is forgotten."""
        later_s = self.now_s + LAST_STEP_S * self.full_size.bit_length()
        assert self.ceiling.size(later_s) == self.full_size


TestDeviceHealth = DeviceHealthMachine.TestCase
TestDeviceHealth.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBatchCeiling = BatchCeilingMachine.TestCase
TestBatchCeiling.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
