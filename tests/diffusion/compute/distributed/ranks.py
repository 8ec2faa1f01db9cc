"""Run a function as the ranks of one replica: gloo processes with one thread each, which end with the test."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from vllm_omni.diffusion.compute.coordination.ranks import connect
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.worker import RankInfo


def run_ranks(function: Callable[..., Any], parallel: DiffusionParallelConfig, *args: Any) -> list[Any]:
    """Run `function(world, *args)` on every rank of a replica; returns the results by rank. Raises if a rank raised.

    Results travel by pickle (tensors as numpy arrays). Processes are forked.
    """
    return run_places(_in_world, parallel, function, parallel, *args)


def _in_world(place: RankInfo, function: Callable[..., Any], parallel: DiffusionParallelConfig, *args: Any) -> Any:
    world = connect(parallel, place, Device("cpu"))
    value = function(world, *args)
    world.mesh.control.all_reduce(torch.zeros(1))  # nobody leaves while others still talk
    world.leave()
    return value


def run_places(function: Callable[..., Any], parallel: DiffusionParallelConfig, *args: Any) -> list[Any]:
    """Run `function(place, *args)` on every rank, like `run_ranks`, but the function connects by itself."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    size = parallel.replica_size
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        port = server.getsockname()[1]
        places = [
            RankInfo(rank=rank, replica_size=size, store_port=port, store_fd=server.fileno() if rank == 0 else None)
            for rank in range(size)
        ]
        processes = [
            context.Process(target=_run, args=(function, place, results, args), daemon=True) for place in places
        ]
        for process in processes:
            process.start()
    try:
        outcomes: dict[int, Any] = {}
        for _ in processes:
            rank, value, trace = results.get()
            assert trace is None, f"rank {rank}:\n{trace}"
            outcomes[rank] = value
        return [outcomes[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(function: Callable[..., Any], place: RankInfo, results: Any, args: tuple[Any, ...]) -> None:
    gc.freeze()  # a collection would look at all objects of the parent, and copy their pages
    tqdm.set_lock(threading.RLock())  # killed while it holds the inherited lock, a rank would block its parent
    torch.set_num_threads(1)
    outcome: tuple[int, Any, str | None]
    try:
        outcome = (place.rank, function(place, *args), None)
    except BaseException:
        outcome = (place.rank, None, traceback.format_exc())
    results.put(outcome)
    sys.stdout.flush()
    os._exit(0)  # the parent's exit handlers are not this process's
