"""A tensor foreseen from the steps at which it was computed (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

NUM_STEADY_STEPS = 3
"""Differences are taken from this many steps after the first on: before, they say nothing (as cache-dit has it)."""


@dataclass(frozen=True)
class Forecast:
    terms: tuple[Tensor, ...]
    """The value where it was last computed, and its derivatives by the step as finite differences."""
    step: int
    """Where that was."""
    first_step: int

    @classmethod
    def begin(cls, value: Tensor, step: int) -> Forecast:
        return cls((value,), step, step)

    def updated(self, value: Tensor, step: int, order: int) -> Forecast:
        """With the value computed at `step`, and derivatives up to `order`."""
        terms = [value]
        if step - self.first_step >= NUM_STEADY_STEPS:
            for before in self.terms[:order]:
                terms.append((terms[-1] - before) / (step - self.step))
        return Forecast(tuple(terms), step, self.first_step)

    def at(self, step: int) -> Tensor:
        """Sum over i of derivative i * elapsed^i / i!."""
        elapsed = step - self.step
        value = self.terms[0]
        for i, term in enumerate(self.terms[1:], start=1):
            value = value + term * (elapsed**i / math.factorial(i))
        return value
