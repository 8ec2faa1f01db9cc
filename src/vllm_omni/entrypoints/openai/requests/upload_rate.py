"""How slowly a body may come: what it has brought is held for it, and others wait for the room."""

from __future__ import annotations

LEAST_BYTES_A_SECOND = 16 * 2**10
"""Over the shortest time: links falter."""
LEAST_LASTING_BYTES_A_SECOND = 64 * 2**10
"""Over `LASTING` times as long. Half of 1 Mbit/s, at which a picture of 50 MB takes seven minutes."""
LASTING = 10


class Pace:
    """Two allowances of waiting, in seconds, that bytes refill: `silence_seconds` and `LASTING` times as much.

    A sender at a steady rate above both may go on for ever; below one of them, it ends after that allowance,
    or as much later as it was ahead. None saves more than it began with, so a fast beginning buys no hours.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._rates = (LEAST_BYTES_A_SECOND, LEAST_LASTING_BYTES_A_SECOND)
        self._most = (silence_seconds, LASTING * silence_seconds)
        self._left: tuple[float, ...] = self._most

    @property
    def patience(self) -> float:
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
