"""Timing of work on a device: repeats after a warm-up, their median and spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

MIN_REPEATS, MAX_REPEATS = 3, 50
BUDGET_SECONDS = 0.5


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    run: Callable[[], object],
    device: torch.device,
    *,
    warm_ups: int = 2,
    budget: float = BUDGET_SECONDS,
    agree: Callable[[float], float] = float,
) -> Spread:
    """Seconds between the start and the end of `run` on the device; hidden time of the host does not count.

    Repeats as often as the budget of seconds allows, within limits; `agree` gives all ranks the number of one rank.
    """
    for _ in range(warm_ups):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds = agree(time.perf_counter() - start)
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(budget / max(seconds, 1e-9))))
    if device.type != "cuda":
        return Spread.of([_host_seconds(run) for _ in range(repeats)])
    marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    synchronize(device)
    return Spread.of([a.elapsed_time(b) / 1000 for a, b in pairwise(marks)])


def measure_long(
    run: Callable[[], object], device: torch.device, *, warm_ups: int = 1, budget: float, most: int = 5
) -> Spread:
    """Seconds of work that takes so long that the host's part hardly counts, such as a step of a video.

    Repeats at least once after the warm-up, then up to `most` times while all repeats together fit the budget.
    """
    for _ in range(warm_ups):
        run()
    synchronize(device)
    times: list[float] = []
    while not times or (len(times) < most and sum(times) + times[-1] <= budget):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return Spread.of(times)


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def release_memory(device: torch.device) -> None:
    """Free the memory of the last measurement for other processes, and reset the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def here() -> torch.device:
    """Device of this machine: the first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
