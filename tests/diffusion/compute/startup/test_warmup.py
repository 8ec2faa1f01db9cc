"""Measurement of steps on a device with little memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_omni.diffusion.compute.coordination.ranks import RanksLostError
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.warmup import StepBudget, measure_steps

BYTES_PER_COPY = 100


@dataclass
class OneOfSome:
    """A fake state of a request."""

    sequence_lengths: tuple[int, ...] = (7,)


class SmallDevice:
    """A fake device with memory for `most_copies`, and fake ranks that are lost when one runs out of memory."""

    is_asynchronous = False
    survive_failures = False
    mesh = SimpleNamespace(cfg_size=1)
    capturer = None

    def __init__(self, most_copies: int) -> None:
        self.most_copies = most_copies
        self.tried: list[int] = []

    def predict(self, states: Sequence[OneOfSome], groups: Sequence[int]) -> None:
        if len(states) not in self.tried:
            self.tried.append(len(states))
        if len(states) > self.most_copies:
            raise MemoryError

    def forget(self, state: OneOfSome) -> None:
        pass

    def elapsed(self, run: Callable[[], object]) -> float:
        run()
        return 0.001

    def transient_memory_bytes(self) -> int:
        return BYTES_PER_COPY * max(self.tried)

    def free_memory_bytes(self) -> int:
        return BYTES_PER_COPY * self.most_copies

    def agree(self, value: float) -> float:
        return value

    def attempt(self, run: Callable[[], object]) -> object:
        try:
            return run()
        except MemoryError as error:
            raise RanksLostError("a rank failed in the middle of a step") from error


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (7, [1, 2, 4]), (8, [1, 2, 4, 8]), (15, [1, 2, 4, 8])])
def test_ranks_that_cannot_survive_failures_try_no_step_that_may_not_fit(most: int, tried: list[int]) -> None:
    device: Any = SmallDevice(most)
    info: Any = SimpleNamespace(sequence_cost=float)
    found = measure_steps(device, OneOfSome(), info, RankTimer(device, device), StepBudget(60.0))  # type: ignore[arg-type]
    assert device.tried == tried
    assert [sample.tokens for sample in found] == [7 * copies for copies in tried]
