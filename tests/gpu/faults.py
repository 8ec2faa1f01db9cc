"""A runner whose rank 1 raises once in the middle of a forward, for worker processes of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.diffusion.messages.worker import RankInfo

GUILTY_RANK = 1
FAULTY_STEP = 2
"""When a request has made so many, the next one of all that run fails."""
ERRORS = {"internal": RuntimeError("poisoned"), "out_of_memory": torch.OutOfMemoryError("no room")}


def fault_file(model: str | Path) -> Path:
    """Whoever writes the name of one of `ERRORS` to it asks for that error; it is gone when the rank has raised it."""
    return Path(model).with_name("fault")


class FaultyRunner(ModelRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        ready = super().start(first)
        if self._rank_info.rank == GUILTY_RANK:
            pipeline: Any = self.pipeline
            # The exchanges of the blocks before it are done; the other ranks wait in that of the last one.
            pipeline.transformer.transformer_blocks[-1].register_forward_pre_hook(self._fail_once)
        return ready

    def _fail_once(self, *_: Any) -> None:
        fault = fault_file(self._config.model)
        if fault.exists() and any(state.step == FAULTY_STEP for state in self._states.values()):
            error = ERRORS[fault.read_text()]
            fault.unlink()
            raise error


def make_runner(config: OmniDiffusionConfig, place: RankInfo) -> FaultyRunner:
    return FaultyRunner(config, load_model_info(config.model, config.load_format), place)
