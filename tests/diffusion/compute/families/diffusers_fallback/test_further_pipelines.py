"""Pipelines with habits of their own: each starts, makes diffusers' own pixels, and pauses after each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from testbed.runner_driver import Drive, make_request, psnr
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf, PipelineOf, RunnerOf
from tests.diffusion.compute.families.diffusers_fallback.test_pictures import calls
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.messages.plan import StepPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi asks for float32
]
PROMPT = "a red apple"
# Fields of a request that the pipeline's call has too, and the further arguments of the call.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CogVideoXPipeline": ({"guidance_scale": 3.0, "num_frames": 9, "max_sequence_length": 64}, {}),
    "CogView4Pipeline": ({"guidance_scale": 3.0, "width": 64, "max_sequence_length": 64}, {}),
    # Its table has no size below 768: a request's own size is made.
    "HunyuanDiTPipeline": ({"guidance_scale": 3.0, "width": 64}, {"use_resolution_binning": False}),
    "HunyuanVideo15Pipeline": ({"num_frames": 5, "negative_prompt": "a blue car"}, {}),
    "LongCatImagePipeline": ({"guidance_scale": 3.0, "width": 64}, {}),
    "MochiPipeline": ({"guidance_scale": 3.0, "num_frames": 7, "max_sequence_length": 64}, {}),
    # Makes a picture of 416x608 or so and resizes it.
    "SanaPipeline": ({"guidance_scale": 3.0, "width": 48, "max_sequence_length": 64}, {}),
}
NUM_STEPS = 2


def request_of(name: str, **fields: Any) -> Any:
    sizes = {"height": 32, "width": 32, "num_inference_steps": NUM_STEPS, "seed": 3, "true_cfg_scale": 1.0}
    return make_request("a", PROMPT, **{**sizes, **CASES[name][0], **fields})


@pytest.mark.parametrize("name", CASES)
def test_a_picture_or_video_is_diffusers_own(runner_of: RunnerOf, pipeline_of: PipelineOf, name: str) -> None:
    fields, told = CASES[name]
    drive = Drive(runner_of(name)).run({0: [request_of(name)]})
    assert not drive.errors
    sizes = {"height": 32, "width": 32, "num_inference_steps": NUM_STEPS}
    generator = torch.Generator("cpu").manual_seed(3)
    output = pipeline_of(name)(PROMPT, generator=generator, output_type="pil", **{**sizes, **fields, **told})
    made = output.frames[0] if "num_frames" in fields else output.images
    expected = np.stack([np.array(picture) for picture in made])
    assert psnr(drive.images["a"].reshape(expected.shape), expected) >= 60


@pytest.mark.parametrize("name", ["HunyuanVideo15Pipeline", "LongCatImagePipeline"])
def test_without_a_step_callback_a_call_pauses_and_ends(runner_of: RunnerOf, name: str) -> None:
    runner = runner_of(name)
    runner.execute(StepPlan(0, new_requests=[request_of(name)], encode=["a"]))
    call = calls(runner)["a"]
    for step in range(1, NUM_STEPS):
        result = runner.execute(StepPlan(step, denoise=["a"]))
        assert (result.advanced, result.num_made("a")) == (["a"], 1)
    assert call.is_alive
    runner.execute(StepPlan(NUM_STEPS, release=["a"]))
    assert not call.is_alive


@pytest.mark.parametrize(
    ("name", "size", "num_frames"),
    [
        ("CogVideoXPipeline", (32, 48), 9),
        ("HunyuanVideo15Pipeline", (480, 848), 121),
        ("MochiPipeline", (480, 848), 19),
        ("CogView4Pipeline", (64, 64), None),
        ("HunyuanDiTPipeline", (128, 128), None),
    ],
)
def test_the_own_size_is_the_pipelines(
    model_of: ModelOf, name: str, size: tuple[int, int], num_frames: int | None
) -> None:
    folder = model_of(name)
    (settings := folder / "default_sampling_params.json").rename(aside := folder / "aside.json")
    try:
        defaults = load_model_info(str(folder)).default_sampling_params
    finally:
        aside.rename(settings)
    assert (defaults["height"], defaults["width"]) == size
    assert defaults.get("num_frames") == num_frames


def test_a_size_that_is_rounded_costs_what_is_made(model_of: ModelOf) -> None:
    info = load_model_info(str(model_of("SanaPipeline")))
    assert isinstance(info, WholeModelInfo)
    assert info.pipeline.made_size(32, 32) == (512, 512)
    assert info.num_image_tokens(32, 32) == info.num_image_tokens(512, 512) == 16 * 16
    height, width = info.pipeline.made_size(32, 64)
    assert (height, width) == (352, 704)
    assert info.num_image_tokens(32, 64) == 11 * 22
    exact = replace(info, pipeline=replace(info.pipeline, bins=()))
    assert exact.num_image_tokens(32, 64) == 2
