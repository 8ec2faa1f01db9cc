"""Timing on which all ranks of a replica agree, and the choice of CPU threads by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device

REPEAT_SECONDS = 0.3
"""A call that takes longer is timed once only."""
SMALL_MODEL_BYTES = 2**30
"""A larger model uses all threads: its operations are large enough, and trying fewer threads would take long."""
THREADS_GAIN = 1.25
"""Least speed-up of a step for twice the threads. A small model loses more to threads that wait for each other than it
gains, most of all on a machine that other processes use."""


@dataclass(frozen=True)
class RankTimer:
    """Wall-clock seconds of calls that all ranks make together: those of the slowest rank."""

    device: Device
    ranks: Ranks

    def fastest(self, runs: Sequence[Callable[[], object]]) -> float:
        """Seconds of the fastest of `runs`; the first is a warm-up. A slow call ends the series."""
        fastest = math.inf
        for run in runs:
            fastest = min(fastest, self.ranks.agree(self.device.elapsed(run)))
            if fastest > REPEAT_SECONDS:
                break
        return fastest

    def mean(self, run: Callable[[], object]) -> float:
        """Mean seconds of up to seven runs after a warm-up. Unlike `fastest`, it includes threads that stall."""
        times = [self.fastest([run]) for _ in range(2)]
        while sum(times) < REPEAT_SECONDS and len(times) < 8:
            times.append(self.fastest([run]))
        return sum(times[1:]) / len(times[1:])


def set_threads(timer: RankTimer, model_bytes: int, num_threads: int | None, step: Callable[[], object]) -> None:
    """Set the CPU threads: `num_threads`, or the best number for a small model where no other rank shares them."""
    if num_threads is not None:
        timer.device.set_num_threads(num_threads)
    elif model_bytes <= SMALL_MODEL_BYTES and timer.ranks.size == 1:
        choose_num_threads(timer.device, timer, step)


def choose_num_threads(device: Device, timer: RankTimer, step: Callable[[], object]) -> None:
    """Double the threads from one on, as long as `step` gains from it. An error leaves their number unchanged."""
    most, chosen, best = device.num_threads, 1, math.inf
    if most == 1:
        return
    count = 1
    try:
        while count <= most:
            device.set_num_threads(count)
            seconds = timer.mean(step)
            if seconds * THREADS_GAIN > best:
                break
            chosen, best, count = count, seconds, 2 * count
    except BaseException:  # whatever ends the choice, the process must not stay with one thread
        device.set_num_threads(most)
        raise
    device.set_num_threads(chosen)
