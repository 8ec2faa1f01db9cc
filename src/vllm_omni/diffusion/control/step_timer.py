"""Times of the running step: its begin, when the next plan is due, and when the step counts as hung."""

from __future__ import annotations

_SEND_AHEAD_SHARE = 0.2
"""The next plan is due when this share of the running one is left (and `_SEND_AHEAD_SECONDS` more): early enough that
the device never waits, late enough to include requests that arrive during the step."""
_SEND_AHEAD_SECONDS = 0.01
STALL_SECONDS = 300.0
STALL_FACTOR = 30.0
"""A step hangs when it takes longer than `STALL_SECONDS` and than `STALL_FACTOR` times its estimate. Both are far
beyond a live step, because a false alarm costs all requests the work done so far."""


class StepTimer:
    """Times in `time.monotonic()` of the oldest plan in flight, as seen by the engine."""

    def __init__(self, stall_seconds: float, stall_factor: float) -> None:
        self._stall_seconds = stall_seconds
        self._stall_factor = stall_factor
        self.began = 0.0
        self.next_due = 0.0
        """Time to send the plan after this one."""
        self._overdue_at = 0.0

    def begin(self, now: float, estimate: float) -> None:
        """Note that a step begins at `now` and is expected to take `estimate` seconds."""
        self.began = now
        self.next_due = now + (1 - _SEND_AHEAD_SHARE) * estimate - _SEND_AHEAD_SECONDS
        self._overdue_at = now + max(self._stall_seconds, self._stall_factor * estimate)

    def is_overdue(self, now: float) -> bool:
        """Whether the step counts as hung."""
        return now >= self._overdue_at

    def wait_seconds(self, now: float, may_send_next: bool) -> float:
        """Seconds until the next plan is due, if one may be sent, or until the step counts as hung."""
        sends_next = may_send_next and self.next_due > now
        return (self.next_due if sends_next else max(self._overdue_at, now)) - now
