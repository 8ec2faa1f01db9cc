"""Measurements that ranks make together, in small: bytes are counted, and a failed rank ends the others' wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks.gpu import exchanges
from benchmarks.gpu.ranks import RankProcesses, in_world, listening_store
from benchmarks.roofline.costs import Branch

from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.data import DiffusionParallelConfig

HEADS, HEAD_DIM = 3, 8
BRANCHES = [Branch(5, 12), Branch(1, 12)]
"""The first rank holds 3 + 6 and 1 + 6 of their tokens, the second one 2 + 6 and 6."""
FIRST, SECOND = 16, 14
TOKEN_BYTES = HEAD_DIM * 4


@contextmanager
def started() -> Iterator[RankProcesses]:
    store = listening_store()
    processes = RankProcesses(2, "cpu", partial(in_world, DiffusionParallelConfig(ulysses_degree=2), "cpu", store.port))
    try:
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    with started() as processes:
        yield processes


def test_bytes_are_those_of_a_layer(ranks: RankProcesses) -> None:
    """The first rank has two of three heads: it gives one away of each of its tokens and is given two."""
    first, second = (parts.exchanges for parts in ranks.run(exchanges.ulysses, BRANCHES, HEADS, HEAD_DIM))
    assert [turn.wire_bytes for turn in first] == [3 * FIRST * TOKEN_BYTES, SECOND * 2 * TOKEN_BYTES]
    assert [turn.wire_bytes for turn in second] == [3 * SECOND * 2 * TOKEN_BYTES, FIRST * TOKEN_BYTES]

    rings = [parts.exchanges for parts in ranks.run(exchanges.ring, BRANCHES, HEADS, HEAD_DIM)]
    assert [turn.wire_bytes for (turn,) in rings] == [2 * n * HEADS * TOKEN_BYTES for n in (FIRST, SECOND)]

    (summed, _) = ranks.run(exchanges.all_reduce, 10, 6)
    assert summed.wire_bytes == 10 * 6 * 4


def test_ranks_agree_on_what_a_layer_took(ranks: RankProcesses) -> None:
    for function in (exchanges.ulysses, exchanges.ring):
        first, second = ranks.run(function, BRANCHES, HEADS, HEAD_DIM)
        assert first.layer == second.layer > 0
        assert first.attention == second.attention > 0


def fail_on_one(world: World, device: torch.device, end: bool) -> Any:
    if world.rank == 1:
        if end:
            os._exit(7)
        raise RuntimeError("no room")
    return exchanges.all_reduce(world, device, 4, 4)


@pytest.mark.parametrize(("end", "said"), [(False, "rank [01]: .*"), (True, "exit code 7|rank 0: GroupBrokenError")])
def test_a_rank_that_fails_ends_them_all(end: bool, said: str) -> None:
    with started() as processes:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=said):
                processes.run(fail_on_one, end)
