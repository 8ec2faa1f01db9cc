"""Rates from made-up measurements, and a warm-up that ends on slow and on small devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_omni.diffusion.worker import warmup
from vllm_omni.diffusion.worker.ranks import RanksLostError
from vllm_omni.diffusion.worker.warmup import Sample, Timer, choose_num_threads, fit_line, knee, measure_steps


def samples(seconds_of: dict[int, float]) -> list[Sample]:
    return [Sample(tokens=t, units=2.0 * t, seconds=s) for t, s in seconds_of.items()]


def test_a_line_is_found() -> None:
    slope, overhead = fit_line(samples({t: 0.01 + 0.001 * t for t in (16, 32, 64, 128)}))
    assert slope == pytest.approx(0.0005)
    assert overhead == pytest.approx(0.01)


def test_one_sample_is_all_work_and_no_overhead() -> None:
    assert fit_line(samples({50: 3.0})) == (0.03, 0.0)


def test_a_noisy_measurement_gives_no_negative_rates() -> None:
    slope, overhead = fit_line(samples({16: 0.1, 32: 0.09, 64: 0.08}))
    assert slope > 0
    assert overhead == 0
    slope, overhead = fit_line(samples({16: 0.01, 32: 0.1, 64: 0.3}))
    assert slope > 0
    assert overhead == 0


def test_the_knee_is_where_more_tokens_gain_little() -> None:
    # Time per unit: 1, 0.6, 0.5, 0.45, 0.44.
    assert knee(samples({16: 32, 32: 38.4, 64: 64, 128: 115.2, 256: 225.28})) == 64
    assert knee(samples({50: 3.0})) == 50


class Threads:
    """A device with some threads; a step takes the seconds of the number in use."""

    def __init__(self, num_threads: int, seconds: dict[int, float]) -> None:
        self.num_threads = num_threads
        self.seconds = seconds
        self.tried: list[int] = []

    def set_num_threads(self, count: int) -> None:
        self.num_threads = count
        self.tried.append(count)


@pytest.mark.parametrize(
    ("most", "seconds", "chosen"),
    [
        (8, {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}, 8),
        (8, {1: 8.0, 2: 4.0, 4: 3.9, 8: 0.1}, 2),
        (2, {1: 0.013, 2: 0.6}, 1),
        (6, {1: 4.0, 2: 2.0, 4: 1.0}, 4),
        (1, {1: 1.0}, 1),
    ],
)
def test_threads_are_taken_while_they_help(most: int, seconds: dict[int, float], chosen: int) -> None:
    device = Threads(most, seconds)

    class FakeTimer:
        def mean(self, run: Callable[[], object]) -> float:
            return device.seconds[device.num_threads]

    choose_num_threads(device, FakeTimer(), lambda: None)  # type: ignore[arg-type]
    assert device.num_threads == chosen


BYTES_PER_COPY = 100


@dataclass
class OneOfSome:
    """A request's state."""

    sequence_lengths: tuple[int, ...] = (7,)


class SmallDevice:
    """Has room for so many copies; the ranks beside it wait for ever for one that ran out of memory."""

    works_ahead = False
    survive_failures = False
    mesh = SimpleNamespace(cfg_size=1)
    recorder = None

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

    def synchronize(self) -> None:
        pass

    def passing_memory_bytes(self) -> int:
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
def test_ranks_that_would_be_lost_try_no_batch_that_may_not_fit(
    monkeypatch: pytest.MonkeyPatch, most: int, tried: list[int]
) -> None:
    monkeypatch.setattr(warmup, "BUDGET_SECONDS", 60.0)
    device: Any = SmallDevice(most)
    info: Any = SimpleNamespace(sequence_cost=float)
    found = measure_steps(device, OneOfSome(), info, Timer(device, device))  # type: ignore[arg-type]
    assert device.tried == tried
    assert [sample.tokens for sample in found] == [7 * copies for copies in tried]
