"""Memory of a device that counts what lies there, and spoils what has left."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.offload.turns import RunMemory

SPOILED = 0xFF
"""Bytes of memory that is not a component's: as floating-point numbers they are NaN."""


class CountingMemory(RunMemory):
    """Bytes by component, and the most at a time. Weights that are used while they are not there are NaN."""

    def __init__(self, device: torch.device, fails_after: int | None = None) -> None:
        """fails_after: number of runs after which one is refused for lack of memory; None: none is."""
        super().__init__(device)
        self.places: dict[str, int] = {}
        self.peak_bytes = 0
        self.num_taken = 0
        self.fails_after = fails_after

    @property
    def num_bytes(self) -> int:
        return sum(self.places.values())

    def take(self, name: str, num_bytes: int) -> Tensor:
        if self.fails_after is not None and self.num_taken >= self.fails_after:
            self.fails_after = None
            raise torch.OutOfMemoryError("no memory for a run")
        self.num_taken += 1
        self.places[name] = self.places.get(name, 0) + num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return super().take(name, num_bytes).fill_(SPOILED)

    def give_back(self, name: str, runs: list[Tensor]) -> None:
        if runs:
            self.places[name] -= sum(len(run) for run in runs)
        if not self.places.get(name, 0):
            self.places.pop(name, None)
        for run in runs:
            run.fill_(SPOILED)
        super().give_back(name, runs)
