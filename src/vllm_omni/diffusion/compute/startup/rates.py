"""Arithmetic of measured times: the rates that the scheduler plans with. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_BATCH_TOKENS = 256
"""Least `max_batch_tokens`, however noisy the measurement: on any device so many tokens are cheap enough for one step.
"""
KNEE = 1.18
"""A step is large enough when a unit costs at most this many times as much as in the cheapest step."""


@dataclass(frozen=True)
class Sample:
    """Tokens, units of `RequestCost` and measured seconds of one step."""

    tokens: int
    units: float
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Measured rates of the model on this device; `WorkerReady` explains the fields."""

    seconds_per_unit: float
    step_overhead_seconds: float
    encode_units_per_token: float
    decode_units_per_token: float
    max_batch_tokens: int
    copy_seconds: float = 0.0

    @classmethod
    def from_times(
        cls,
        samples: Sequence[Sample],
        encode_seconds_per_token: float,
        decode_seconds_per_token: float,
        max_batch_tokens: int = MIN_BATCH_TOKENS,
        copy_seconds: float = 0.0,
    ) -> Rates:
        """Rates from the steps `samples`, and from the time of a prompt token and of an image token.

        copy_seconds: of the copies beside a step, without which the samples were measured.
        """
        seconds_per_unit, overhead = fit_line(samples)
        return cls(
            seconds_per_unit=seconds_per_unit,
            step_overhead_seconds=overhead,
            encode_units_per_token=encode_seconds_per_token / seconds_per_unit,
            decode_units_per_token=decode_seconds_per_token / seconds_per_unit,
            max_batch_tokens=max(MIN_BATCH_TOKENS, max_batch_tokens),
            copy_seconds=copy_seconds,
        )


def fit_line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Seconds per unit and seconds per step, by least squares of the relative error; both at least 0."""
    weights = [1 / sample.seconds**2 for sample in samples]
    total = sum(weights)
    mean_units = sum(w * s.units for w, s in zip(weights, samples)) / total
    mean_seconds = sum(w * s.seconds for w, s in zip(weights, samples)) / total
    spread = sum(w * (s.units - mean_units) ** 2 for w, s in zip(weights, samples))
    slope = (
        sum(w * (s.units - mean_units) * (s.seconds - mean_seconds) for w, s in zip(weights, samples)) / spread
        if spread > 0
        else 0.0
    )
    overhead = mean_seconds - slope * mean_units
    if slope <= 0 or overhead < 0:
        return samples[-1].seconds / samples[-1].units, 0.0
    return slope, overhead


def knee(samples: Sequence[Sample]) -> int:
    """Tokens of the smallest step whose time per unit is near the best."""
    best = min(s.seconds / s.units for s in samples)
    return next(s.tokens for s in samples if s.seconds / s.units <= KNEE * best)
