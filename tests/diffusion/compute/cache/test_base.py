"""Forecasts, relative changes, slots and the cache budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vllm_omni.diffusion.compute.cache.base import Budget, CacheSlot, SlotContent, relative_changes
from vllm_omni.diffusion.compute.cache.taylor import Forecast
from vllm_omni.diffusion.compute.distributed.groups import Group


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_forecast_continues_polynomials_by_finite_differences(order: int) -> None:
    steps = [0, 1, 2, 3, 4, 6, 7, 9]

    def value(step: int) -> Tensor:
        return torch.tensor([0.5 * step**2 - step + 2, 3.0 * step], dtype=torch.float64)

    forecast = Forecast.after(None, value(0), 0, 2)
    terms = [value(0)]
    for before, step in pairwise(steps):
        forecast = Forecast.after(forecast, value(step), step, order)
        now = [value(step)]
        if step >= 3:
            for i in range(min(order, len(terms))):
                now.append((now[i] - terms[i]) / (step - before))
        terms = now
    assert len(forecast.terms) == order + 1
    wanted = sum((term * 2**i / math.factorial(i) for i, term in enumerate(terms)), torch.zeros(2))
    torch.testing.assert_close(forecast.at(11), wanted)
    if order >= 1:
        assert forecast.at(11)[1] == 33, "a straight line is continued exactly"


def test_changes_are_relative_to_what_was() -> None:
    now, before = torch.tensor([1.0, -2.0]), torch.tensor([2.0, -2.0])
    changes = relative_changes([(now, before), (now, None), (before, before), (now, torch.zeros(2))], Group.alone())
    assert changes[:3] == [0.25, math.inf, 0.0]
    assert changes[3] == math.inf
    assert relative_changes([], Group.alone()) == []


@dataclass(frozen=True)
class Some(SlotContent):
    values: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.values


def test_a_slot_goes_on_from_the_last_step_alone() -> None:
    slot, budget = CacheSlot(), Budget()
    budget.watch(slot)
    shared, first = Some((torch.zeros(10), torch.zeros(5))), torch.zeros(3)
    slot.put(shared, skipped=False)
    slot.put(shared, skipped=False)  # the step is repeated
    assert slot.settle() is False
    slot.put(Some((*shared.values[:1], first)), skipped=True)
    assert slot.content is shared, "until the step is done"
    assert budget.num_bytes == 4 * (10 + 5 + 3), "what both share counts once"
    assert slot.settle() is True
    assert budget.num_bytes == 4 * (10 + 3)
    assert slot.settle() is False, "another rank group computed it"
    assert slot.content is None
    assert budget.num_bytes == 0
    slot.put(shared, skipped=False)
    del slot
    assert budget.num_bytes == 0, "it dies with its request"
