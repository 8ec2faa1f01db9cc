"""Run a function as the ranks of one replica: gloo processes with one thread each, which end with the test."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed.mesh import World

GUARD_SECONDS = 120


def run_ranks(function: Callable[..., Any], parallel: DiffusionParallelConfig, *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank of a replica -> their results by rank. Raises what a rank raised.

    `function` must be importable and its result small enough to be pickled. Processes are forked.
    """
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        ranks = [
            context.Process(target=_rank, args=(function, parallel, rank, server, results, args), daemon=True)
            for rank in range(parallel.replica_size)
        ]
        for process in ranks:
            process.start()
    try:
        outcomes: dict[int, Any] = {}
        for _ in ranks:
            rank, value, trace = results.get()
            assert trace is None, f"rank {rank}:\n{trace}"
            outcomes[rank] = value
        for process in ranks:
            process.join(GUARD_SECONDS)
        return [outcomes[rank] for rank in range(len(ranks))]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(
    function: Callable[..., Any],
    parallel: DiffusionParallelConfig,
    rank: int,
    server: socket.socket,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore(
            "127.0.0.1",
            server.getsockname()[1],
            is_master=rank == 0,
            timeout=timedelta(seconds=GUARD_SECONDS),
            wait_for_workers=False,
            master_listen_fd=server.detach() if rank == 0 else None,
        )
        world = World(parallel, rank, torch.device("cpu"), store)
        value = function(world, *args)
        world.mesh.control.all_reduce(torch.zeros(1))  # nobody leaves while others still talk
        world.leave()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
