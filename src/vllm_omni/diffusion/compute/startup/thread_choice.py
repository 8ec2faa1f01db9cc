"""Number of CPU threads that share one operation of the model."""

from __future__ import annotations

import math
from collections.abc import Callable

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer

SMALL_MODEL_BYTES = 2**30
"""A larger model uses all threads: its operations are large enough, and trying fewer threads would take long."""
THREADS_GAIN = 1.25
"""Least speed-up of a step for twice the threads. A small model loses more to threads that wait for each other than it
gains, most of all on a machine that other processes use."""


def set_threads(timer: RankTimer, model_bytes: int, num_threads: int | None, step: Callable[[], object]) -> None:
    """Set the threads of this process: `num_threads` if given, else the best number for a small model.

    Ranks that share a machine already have their part of the threads, so only a replica of one rank chooses.
    """
    if num_threads is not None:
        timer.device.set_num_threads(num_threads)
    elif model_bytes <= SMALL_MODEL_BYTES and timer.ranks.size == 1:
        choose_num_threads(timer.device, timer, step)


def choose_num_threads(device: Device, timer: RankTimer, step: Callable[[], object]) -> None:
    """Double the threads from one up to those of this process, as long as `step` gains from it.

    When `step` raises, the number of threads is the same as before the call.
    """
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
