"""Report of a move of weights between the device and host memory."""

from __future__ import annotations

from dataclasses import dataclass

ANOTHER_RANK = "another rank lacks memory"
"""Failure of a rank that has enough memory itself."""


@dataclass(frozen=True)
class WeightsMoved:
    """Answer of one rank, or of all ranks together, to `Sleep` or `WakeUp`."""

    num_bytes: int
    """Bytes of the weights that moved."""
    seconds: float
    device_bytes: int = 0
    """Memory that PyTorch holds on the device afterwards; 0 on a CPU."""
    failure: str = ""
    """Reason why no rank has moved its weights; empty: all have."""
