"""One folder and one loaded runner for each pipeline, for all tests of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from testbed.tiny_diffusers import build_tiny_diffusers
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

ModelOf = Callable[[str], Path]
RunnerOf = Callable[[str], ModelRunner]
DEFAULTS: dict[str, dict[str, object]] = {
    "CogVideoXPipeline": {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2},
    "HunyuanVideo15Pipeline": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2},
    "LTXImageToVideoPipeline": {"num_frames": 9},
    "MochiPipeline": {"height": 32, "width": 32, "num_frames": 7, "num_inference_steps": 2},
    "SkyReelsV2Pipeline": {"num_frames": 5},
}
"""Over those of `build_tiny_diffusers`."""
PipelineOf = Callable[[str], Any]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """The folder of a pipeline class."""

    @cache
    def build(name: str) -> Path:
        return build_tiny_diffusers(name, tmp_path_factory.mktemp("models") / name, **DEFAULTS.get(name, {}))

    return build


@pytest.fixture(scope="session")
def pipeline_of(model_of: ModelOf) -> PipelineOf:
    """diffusers' own pipeline of a class: the oracle."""

    @cache
    def load(name: str) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(model_of(name), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def runner_of(model_of: ModelOf) -> Iterator[RunnerOf]:
    """A started runner of a pipeline class."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @cache
    def start(name: str) -> ModelRunner:
        model = str(model_of(name))
        runner = ModelRunner(OmniDiffusionConfig(model=model), load_model_info(model))
        runner.start()
        return runner

    yield start
    torch.set_num_threads(threads)
