"""Whole pipelines on a GPU, with and without offload, against diffusers on the same GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from testbed.runner_driver import psnr
from testbed.tiny_diffusers import build_tiny_diffusers
from tests.gpu.marks import NEEDS_GPU
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

pytestmark = [
    NEEDS_GPU,
    # NumPy 2.5 warns of arrays that diffusers' schedulers make; newer libraries are not what is tested here.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
PROMPTS = ["a red apple", "a blue car"]
PARAMS = [
    OmniDiffusionSamplingParams(num_inference_steps=4, guidance_scale=3.5, seed=1, output_type="np"),
    OmniDiffusionSamplingParams(num_inference_steps=7, guidance_scale=2.0, seed=2, height=96, output_type="np"),
]


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline"])
def test_pictures_are_diffusers_own_wherever_the_weights_lie(tmp_path: Path, name: str) -> None:
    model = build_tiny_diffusers(name, tmp_path / name)
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    expected = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        arguments = {"guidance_scale": params.guidance_scale, "num_inference_steps": params.num_inference_steps}
        if name != "StableDiffusionXLPipeline":
            arguments["max_sequence_length"] = 128
        generator = torch.Generator("cpu").manual_seed(params.seed or 0)
        sizes = {"height": params.height or 64, "width": 64}
        expected.append(np.array(pipeline(prompt, generator=generator, **sizes, **arguments).images[0]))
    choices: list[dict[str, Any]] = [{}, {"enable_cpu_offload": True}, {"enable_layerwise_offload": True}]
    for settings in choices:
        with Omni(model=str(model), dtype="float32", progress_bar=False, **settings) as omni:
            outputs = omni.generate(PROMPTS, PARAMS)  # both at once
        ratios = [psnr(output.images[0], picture) for output, picture in zip(outputs, expected, strict=True)]
        print(name, settings, ratios)
        assert min(ratios) >= 50
