"""Processes, one per device, that run functions at the same time: ranks on GPUs or, with gloo, on a CPU."""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch._C._distributed_c10d import TCPStore

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.device.kinds import CPU
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.data import DiffusionParallelConfig

PATIENCE_SECONDS = 180.0
"""Seconds that one function may take."""
_LOOK_SECONDS = 1.0


class RankProcesses:
    """Rank processes, started at once, that wait for functions. If one fails, all are ended: others may wait for it."""

    def __init__(
        self,
        size: int,
        kind: str,
        prepare: Callable[[int], tuple[Any, ...]],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """`kind`: `Device.kind` of the devices. `prepare`: makes the first arguments of functions, once per rank."""
        # CUDA does not work in a fork of a process that uses it; without CUDA, a fork saves the imports.
        context: Any = mp.get_context("fork" if kind == CPU else "spawn")
        self._outbox = context.Queue()
        self._inboxes = [context.SimpleQueue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, kind, prepare, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()
        self._patience_seconds = patience_seconds
        self._failure = ""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*prepared, *args)` on every rank; return the results by rank. Everything is pickled.

        Raises RuntimeError with a rank's error, also one of an earlier function.
        """
        if not self._failure:
            for inbox in self._inboxes:
                inbox.put((function, args))
            outcomes: dict[int, Any] = {}
            deadline = time.monotonic() + self._patience_seconds
            while not self._failure and len(outcomes) < len(self._processes):
                self._take(outcomes, deadline)
            if not self._failure:
                return [outcomes[rank] for rank in range(len(self._processes))]
            self.close()
        raise RuntimeError(self._failure)

    def _take(self, outcomes: dict[int, Any], deadline: float) -> None:
        try:
            rank, value, failure = self._outbox.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            if dead := [rank for rank, process in enumerate(self._processes) if not process.is_alive()]:
                self._failure = f"rank {dead[0]} ended with exit code {self._processes[dead[0]].exitcode}"
            elif time.monotonic() > deadline:
                self._failure = f"the ranks took longer than {self._patience_seconds:g} s"
            return
        outcomes[rank] = value
        if failure:
            self._failure = f"rank {rank}: {failure}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def in_world(parallel: DiffusionParallelConfig, kind: str, port: int, rank: int) -> tuple[World, torch.device]:
    """`prepare` for ranks that communicate: process groups of a replica, which connect through a `listening_store`."""
    device = Device(kind, rank)  # type: ignore[arg-type]  # a kind is a choice
    return World(parallel, rank, device.torch, TCPStore("127.0.0.1", port, is_master=False)), device.torch


def listening_store() -> TCPStore:
    """TCP store through which ranks find each other, on a free port, until it is deleted."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _serve(rank: int, kind: str, prepare: Callable[[int], tuple[Any, ...]], inbox: Any, outbox: Any) -> None:
    if kind == CPU:
        torch.set_num_threads(1)
    try:
        prepared = prepare(rank)
        while True:
            function, args = inbox.get()
            with torch.inference_mode():
                outbox.put((rank, function(*prepared, *args), ""))
    except Exception as error:
        traceback.print_exc()
        outbox.put((rank, None, f"{type(error).__name__}: {error}"))
        time.sleep(PATIENCE_SECONDS)  # until the parent, which has the error, ends all ranks
