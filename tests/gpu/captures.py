"""Pictures drawn on a GPU with and without CUDA graphs, and how many graphs were replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.runner_driver import Drive
from tests.diffusion.compute.families.test_cuda_graphs import BUILDERS
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest


@dataclass
class Replays:
    """Number of graph replays since `draw` began."""

    num: int = 0

    @classmethod
    def counted(cls, monkeypatch: pytest.MonkeyPatch) -> Replays:
        """Count all replays of the test."""
        replays = cls()

        class Counting(torch.cuda.CUDAGraph):
            def replay(self) -> None:
                replays.num += 1
                super().replay()

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Counting)
        return replays

    def draw(self, path: Path, arrivals: Mapping[int, Sequence[DiffusionRequest]], **settings: Any) -> Drive:
        """Run requests on a new runner for the model at `path`; arrivals: see `Drive.run`."""
        runner = ModelRunner(OmniDiffusionConfig(model=str(path), **settings), load_model_info(str(path)))
        runner.start()
        self.num = 0  # those of the warm-up do not count
        drive = Drive(runner).run(arrivals)
        assert drive.errors == {}
        return drive


def model_of(family: str, folder: Path, quantization: str | None) -> Path:
    """A tiny model, or the demo model, which alone is wide enough for float8; the test is skipped for others."""
    if family == "demo":
        return DEMO_MODEL_PATH
    if quantization:
        pytest.skip("too narrow for float8")
    return BUILDERS[family](folder)


def dtype_for(quantization: str | None) -> str:
    return "bfloat16" if quantization else "float32"
