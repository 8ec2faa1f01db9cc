"""Processes, one a GPU, in which whole runners of one layout after another draw the same requests.

An engine would start processes for each layout; here libraries are imported and GPUs woken once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.ranks import RankProcesses, listening_store

from testbed.runner_driver import Drive, make_request
from tests.diffusion.compute.cache.driving import Skips, watch_skips
from tests.diffusion.compute.cache.test_layouts import Runs, in_turn
from tests.diffusion.compute.worker.replica import merging, started
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo

PATIENCE_SECONDS = 90.0
"""For all that one layout draws: a rank that hangs costs no more."""
ARRIVALS = {
    0: [make_request("r-0", negative_prompt="a blue car", num_inference_steps=12, seed=1)],
    2: [
        make_request("r-1", "a photo", height=80, width=112, num_inference_steps=9, seed=2),
        make_request("r-2", "apple " * 9, height=48, width=16, negative_prompt="", num_inference_steps=7, seed=3),
    ],
    3: [make_request("r-3", "", height=96, negative_prompt=" ", num_inference_steps=5, seed=4, cache=False)],
}
"""Mixed sizes, guidance and texts, none of which divide among four; one computes every step."""


class Pool:
    """The processes, started when first used and again after a failure."""

    def __init__(self, size: int, kind: str) -> None:
        self._size = size
        self._kind = kind
        self._processes: RankProcesses | None = None

    def draw(self, parallel: DiffusionParallelConfig, path: Path, settings: dict[str, Any]) -> list[Runs]:
        """By rank of a replica, its pictures and what it skipped; processes that are left over draw the same."""
        if self._processes is None:
            self._processes = RankProcesses(self._size, self._kind, _nothing_but_the_rank, PATIENCE_SECONDS)
        stores = [listening_store() for _ in range(self._size // parallel.replica_size)]
        try:
            drawn = self._processes.run(_draw, [store.port for store in stores], parallel, path, settings)
        except RuntimeError:
            self._processes = None
            raise
        return drawn[: parallel.replica_size]

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()


def _nothing_but_the_rank(rank: int) -> tuple[int]:
    return (rank,)


def _draw(
    index: int, ports: list[int], parallel: DiffusionParallelConfig, path: Path, settings: dict[str, Any]
) -> Runs:
    replica, rank = divmod(index, parallel.replica_size)
    place = RankInfo(rank, parallel.replica_size, replica, ports[replica])
    runner = started(place, parallel, path, **settings)
    skips = watch_skips(runner)
    merge: Callable[[Any], Any] = merging(runner)
    drive = Drive(runner, partial(in_turn, parallel.cfg_parallel_size), merge).run(ARRIVALS)
    assert drive.errors == {}
    if (world := runner.ranks.world) is not None:
        world.mesh.control.all_reduce(torch.zeros(1))  # nobody leaves while others still talk
        world.leave()
    seen: Skips = {request_id: [list(steps) for steps in branches] for request_id, branches in skips.items()}
    return [(drive.images, seen)]
