"""Forecast of a tensor from the steps at which it was computed (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NUM_STEADY_STEPS = 3
"""Finite differences are taken from this many steps after the first on, as in cache-dit."""


@dataclass(frozen=True)
class Forecast:
    """A tensor and its finite differences at the last step that computed it."""

    terms: tuple[Tensor, ...]
    """The tensor, then its first, second, ... derivative by the step."""
    step: int
    """Last step that computed the tensor."""
    first_step: int
    """First step that computed it."""

    @staticmethod
    def after(last: Forecast | None, value: Tensor, step: int, order: int) -> Forecast:
        """Forecast after `value` was computed at `step`, with derivatives up to `order`. last: None at first."""
        terms, first_step = [value], step if last is None else last.first_step
        if last is not None and step - first_step >= NUM_STEADY_STEPS:
            for before in last.terms[:order]:
                terms.append((terms[-1] - before) / (step - last.step))
        return Forecast(tuple(terms), step, first_step)

    def at(self, step: int) -> Tensor:
        """Expected tensor at a later step: sum over i of derivative i * elapsed^i / i!."""
        elapsed = step - self.step
        value = self.terms[0]
        for i, term in enumerate(self.terms[1:], start=1):
            value = value + term * (elapsed**i / math.factorial(i))
        return value
