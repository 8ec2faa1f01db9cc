"""Timing on which all ranks of a replica agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device

REPEAT_SECONDS = 0.3
"""A call that takes longer is timed once only."""


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
