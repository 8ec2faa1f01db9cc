"""Recent deaths of workers, and the pause before the next start that follows from them.

Executors notice a death (`executor/multiproc.py`), and `DiffusionEngine._restart` acts on it.
"""

from __future__ import annotations

from collections import deque

RESTART_WINDOW_SECONDS = 600.0
RESTART_BACKOFF_SECONDS = 0.5
MAX_RESTART_BACKOFF_SECONDS = 30.0


class WorkerDeaths:
    """Counts the deaths of the last `RESTART_WINDOW_SECONDS`."""

    def __init__(self, backoff_seconds: float, max_backoff_seconds: float) -> None:
        """The pause about doubles with each death, from `backoff_seconds` to `max_backoff_seconds`."""
        self._backoff_seconds = backoff_seconds
        self._max_backoff_seconds = max_backoff_seconds
        self._times: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._times)

    def note(self, now: float) -> None:
        """Add a death at `now` (`time.monotonic()`); forget deaths outside the window."""
        self._times.append(now)
        while self._times[0] < now - RESTART_WINDOW_SECONDS:
            self._times.popleft()

    @property
    def pause_seconds(self) -> float:
        """Pause before the next start: 0, 1, 3, 7, ... times the back-off, limited to its maximum."""
        doublings = min(len(self) - 1, 30)  # 2.0 ** 1024 overflows
        return min(self._max_backoff_seconds, self._backoff_seconds * (2.0**doublings - 1))
