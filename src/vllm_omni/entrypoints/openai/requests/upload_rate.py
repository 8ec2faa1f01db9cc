"""How slowly a body may come: what it has brought is held for it, and others wait for the room."""

from __future__ import annotations

MIN_BYTES_PER_SECOND = 16 * 2**10
"""Over the shortest time: links falter."""
MIN_LASTING_BYTES_PER_SECOND = 64 * 2**10
"""Over `LONG_FACTOR` times as long. Half of 1 Mbit/s, at which a picture of 50 MB takes seven minutes."""
LONG_FACTOR = 10


class UploadRate:
    """Two allowances of waiting, in seconds, that bytes refill: `silence_seconds` and `LONG_FACTOR` times as much.

    A sender at a steady rate above both may go on for ever; below one of them, it ends after that allowance,
    or as much later as it was ahead. None saves more than it began with, so a fast beginning buys no hours.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._rates = (MIN_BYTES_PER_SECOND, MIN_LASTING_BYTES_PER_SECOND)
        self._most = (silence_seconds, LONG_FACTOR * silence_seconds)
        self._left: tuple[float, ...] = self._most

    @property
    def seconds_left(self) -> float:
        """Seconds until the next bytes must have come."""
        return min(self._left)

    def count(self, num_bytes: int, seconds: float) -> None:
        """These came after a wait of so many seconds."""
        self._left = tuple(
            min(most, left + num_bytes / rate - seconds)
            for most, left, rate in zip(self._most, self._left, self._rates, strict=True)
        )

    def __str__(self) -> str:
        (short, lasting), (rate, lasting_rate) = self._most, self._rates
        return f"{rate} bytes a second for {short:g} seconds, or than {lasting_rate} for {lasting:g}"
