"""One folder and one loaded runner for each pipeline, for all tests of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.tiny_diffusers import build_tiny_diffusers
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.registry import load_model_info
from vllm_omni.diffusion.worker.runner import ModelRunner

ModelOf = Callable[[str], Path]
RunnerOf = Callable[[str], ModelRunner]
NUM_FRAMES = {"LTXImageToVideoPipeline": 9, "WanPipeline": 5}
PipelineOf = Callable[[str], Any]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """The folder of a pipeline class."""

    @cache
    def build(name: str) -> Path:
        defaults = {"num_frames": NUM_FRAMES[name]} if name in NUM_FRAMES else {}
        return build_tiny_diffusers(name, tmp_path_factory.mktemp("models") / name, **defaults)

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
