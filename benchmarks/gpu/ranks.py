"""Processes that are the ranks of a replica and run functions together, on the GPUs or, with gloo, on a CPU."""

from __future__ import annotations

import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed.mesh import World
from vllm_omni.diffusion.worker.device import CPU, Device

PATIENCE_SECONDS = 180.0
"""For all that one function does."""
_LOOK_SECONDS = 1.0


class RankProcesses:
    """They start at once and wait for functions. When one fails all are ended, for the others may wait for it."""

    def __init__(self, parallel: DiffusionParallelConfig, kind: str) -> None:
        """kind: of the devices, as `Device.kind`; rank i has the one of index i."""
        # What a process knows of a GPU is of no use to a fork of it; without one, a fork need not import all again.
        context: Any = mp.get_context("fork" if kind == CPU else "spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        size = parallel.replica_size
        self._outbox = context.Queue()
        self._inboxes = [context.SimpleQueue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, parallel, kind, store, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()
        self._failure = ""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(world, device, *args)` on every rank -> what each returned. All of it is pickled.

        Raises RuntimeError with what a rank raised, or said of an earlier function.
        """
        if not self._failure:
            for inbox in self._inboxes:
                inbox.put((function, args))
            outcomes: dict[int, Any] = {}
            deadline = time.monotonic() + PATIENCE_SECONDS
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
                self._failure = f"the ranks took longer than {PATIENCE_SECONDS:g} s"
            return
        outcomes[rank] = value
        if failure:
            self._failure = f"rank {rank}: {failure}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, parallel: DiffusionParallelConfig, kind: str, store: str, inbox: Any, outbox: Any) -> None:
    if kind == CPU:
        torch.set_num_threads(1)
    try:
        device = Device(kind, rank)  # type: ignore[arg-type]  # a kind is a choice
        world = World(parallel, rank, device.torch, FileStore(store, parallel.replica_size))
        while True:
            function, args = inbox.get()
            with torch.inference_mode():
                outbox.put((rank, function(world, device.torch, *args), ""))
    except Exception as error:
        traceback.print_exc()
        outbox.put((rank, None, f"{type(error).__name__}: {error}"))
        time.sleep(PATIENCE_SECONDS)  # until the parent, which has heard of it, ends all of them
