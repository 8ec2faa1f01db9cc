"""Turns that catch a use of weights which are not on the device, and count what is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.host_runs import NewRun
from vllm_omni.diffusion.compute.families import component_loader
from vllm_omni.diffusion.compute.offload.turns import RunMemory, Turns
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline
from vllm_omni.diffusion.compute.worker.runner import ModelRunner

SPOILED = 0xFF
"""Bytes of memory that is not a component's: as floating-point numbers they are NaN."""


class CountingMemory(RunMemory):
    """Bytes by component, and the most at a time. Memory that has no weights yet, or has them no more, is spoiled."""

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
        with torch.inference_mode():  # runs that were taken within a step are inference tensors
            for run in runs:
                run.fill_(SPOILED)
        super().give_back(name, runs)


class StrictTurns(Turns):
    """Components at rest have spoiled weights: on a CPU those of the host could be used like those of the device."""

    memory: CountingMemory

    def __init__(
        self, device: torch.device, is_on: bool, memory: CountingMemory | None = None, new_run: NewRun | None = None
    ) -> None:
        """new_run: not used, because other ranks would read what this one spoils."""
        self.memory = memory or CountingMemory(device)
        super().__init__(device, is_on, self.memory)

    def begin(self, max_bytes: int) -> None:
        super().begin(max_bytes)
        for name in self._components:
            self._spoil(name)

    def _leave(self, name: str) -> None:
        super()._leave(name)
        self._spoil(name)

    def _spoil(self, name: str) -> None:
        component = self._components[name]
        component.attach([torch.full_like(run, SPOILED) for run in component.host])


def use_strict_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packed pipelines that load from now on have strict turns."""
    monkeypatch.setattr(component_loader, "Turns", StrictTurns)


def turns_of(runner: ModelRunner) -> StrictTurns:
    """Turns of a runner that loaded its model with them."""
    assert isinstance(runner.pipeline, PackedPipeline)
    assert isinstance(runner.pipeline.turns, StrictTurns)
    return runner.pipeline.turns
