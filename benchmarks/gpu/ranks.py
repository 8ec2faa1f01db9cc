"""Processes, one a device, that run functions at the same time: ranks on GPUs or, with gloo, on a CPU."""

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
"""For all that one function does."""
_LOOK_SECONDS = 1.0


class RankProcesses:
    """They start at once and wait for functions. When one fails all are ended, for the others may wait for it."""

    def __init__(
        self,
        size: int,
        kind: str,
        prepare: Callable[[int], tuple[Any, ...]],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """kind: of the devices, as `Device.kind`; prepare: what a rank makes once, for all functions to begin with."""
        # What a process knows of a GPU is of no use to a fork of it; without one, a fork need not import all again.
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
        """`function(*prepared, *args)` on every rank -> what each returned. All of it is pickled.

        Raises RuntimeError with what a rank raised, or said of an earlier function.
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
    """To prepare ranks that talk: the process groups of a replica, which meet at a `listening_store`."""
    device = Device(kind, rank)  # type: ignore[arg-type]  # a kind is a choice
    return World(parallel, rank, device.torch, TCPStore("127.0.0.1", port, is_master=False)), device.torch


def listening_store() -> TCPStore:
    """Where ranks meet, at its port, for as long as it is kept."""
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
        time.sleep(PATIENCE_SECONDS)  # until the parent, which has heard of it, ends all of them
