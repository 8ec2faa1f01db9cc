"""The slowest rate of an upload: a slow one occupies the upload budget that other requests need."""

from __future__ import annotations

MIN_BYTES_PER_SECOND = 16 * 2**10
"""Minimum rate over `silence_seconds`. It is low, because links have short interruptions."""
MIN_LASTING_BYTES_PER_SECOND = 64 * 2**10
"""Minimum rate over `LONG_FACTOR * silence_seconds`: half of 1 Mbit/s, at which 50 MB take seven minutes."""
LONG_FACTOR = 10


class UploadRate:
    """Two allowances of waiting time: one of `silence_seconds`, one of `LONG_FACTOR` times as much.

    Waiting uses up both allowances, and bytes refill them at their minimum rates, never above their first value. So a
    sender above both rates may go on for ever, and a fast beginning does not allow a long pause later.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._rates = (MIN_BYTES_PER_SECOND, MIN_LASTING_BYTES_PER_SECOND)
        self._most = (silence_seconds, LONG_FACTOR * silence_seconds)
        self._left: tuple[float, ...] = self._most

    @property
    def seconds_left(self) -> float:
        """Seconds within which the next bytes must arrive."""
        return min(self._left)

    def count(self, num_bytes: int, seconds: float) -> None:
        """Count `num_bytes` that arrived after a wait of `seconds`."""
        self._left = tuple(
            min(most, left + num_bytes / rate - seconds)
            for most, left, rate in zip(self._most, self._left, self._rates, strict=True)
        )

    def __str__(self) -> str:
        (short, lasting), (rate, lasting_rate) = self._most, self._rates
        return f"{rate} bytes a second for {short:g} seconds, or than {lasting_rate} for {lasting:g}"
