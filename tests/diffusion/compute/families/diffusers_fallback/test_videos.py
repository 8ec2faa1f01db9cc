"""Pipelines that make frames: they are diffusers' own; how many there may be; what of HTTP says so."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from testbed.runner_driver import Drive, make_request, psnr
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf, PipelineOf, RunnerOf
from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import ConfigError, InvalidRequestError, RequestAbortedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

SKY_REELS, LTX = "SkyReelsV2Pipeline", "LTXImageToVideoPipeline"
PROMPT = "a red apple"
READY = WorkerReady(1.0, 1, "cpu", "float32", 4096, 1e-6, 0.0, 0.5, 2.0)
LIMITS: dict[str, Any] = {"max_sequence_length": 64, "num_inference_steps": 3}


def filmed(pipeline: Any, seed: int, **arguments: Any) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = {"height": 64, "width": 64, "num_frames": 5, **LIMITS, **arguments}
    (frames,) = pipeline(prompt=PROMPT, generator=generator, output_type="pil", **values).frames
    return np.stack([np.array(frame) for frame in frames])


@pytest.mark.thorough
def test_frames_are_diffusers_own(model_of: ModelOf, pipeline_of: PipelineOf) -> None:
    """Out of a worker process, as PIL pictures, two requests of other sizes and lengths at once."""
    params = [
        OmniDiffusionSamplingParams(seed=1, num_outputs_per_prompt=2, **LIMITS),
        OmniDiffusionSamplingParams(seed=7, num_frames=9, width=96, guidance_scale=1.0, **LIMITS),
    ]
    with Omni(model=str(model_of(SKY_REELS)), progress_bar=False) as omni:
        first, second = omni.generate([PROMPT, PROMPT], params)
    assert all(isinstance(frame, Image.Image) for frame in first.images[0])
    assert [len(frames) for frames in first.images] == [5, 5]
    pipeline = pipeline_of(SKY_REELS)
    expected = [
        (first.images[0], filmed(pipeline, 1)),
        (first.images[1], filmed(pipeline, 2)),
        (second.images[0], filmed(pipeline, 7, num_frames=9, width=96, guidance_scale=1.0)),
    ]
    for frames, wanted in expected:
        got = np.stack([np.array(frame) for frame in frames])
        assert got.shape == wanted.shape
        assert psnr(got, wanted) >= 60


def test_videos_under_way_do_not_touch_one_another(
    model_of: ModelOf, runner_of: RunnerOf, pipeline_of: PipelineOf
) -> None:
    fields: dict[str, Any] = {"guidance_scale": 6.0, "true_cfg_scale": 6.0, **LIMITS}
    requests = [
        make_request("a", PROMPT, seed=1, num_frames=9, **fields),
        make_request("b", PROMPT, seed=2, num_frames=5, width=96, **fields),
    ]
    drive = Drive(runner_of(SKY_REELS)).run({0: [requests[0]], 1: [requests[1]]})
    assert not drive.errors
    assert psnr(drive.images["a"], filmed(pipeline_of(SKY_REELS), 1, num_frames=9)) >= 60
    assert psnr(drive.images["b"], filmed(pipeline_of(SKY_REELS), 2, width=96)) >= 60


def test_a_video_that_the_pipeline_rounds_is_not_delivered(model_of: ModelOf, runner_of: RunnerOf) -> None:
    """Nothing in the configs of this pipeline tells that it rounds."""
    request = make_request("a", PROMPT, num_frames=6, guidance_scale=1.0, **LIMITS)
    drive = Drive(runner_of(SKY_REELS)).run({0: [request]})
    assert "a" not in drive.images
    assert drive.errors["a"].message == "the pipeline makes 5 frames of num_frames 6"


def test_a_picture_becomes_a_video(model_of: ModelOf, pipeline_of: PipelineOf) -> None:
    """LTX is told the frames a second, by another name, and they matter."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    prompt = {"prompt": PROMPT, "multi_modal_data": {"image": image}}
    params = OmniDiffusionSamplingParams(seed=1, height=64, width=64, fps=8, output_type="np", **LIMITS)
    with Omni(model=str(model_of(LTX)), distributed_executor_backend="uni", progress_bar=False) as omni:
        (output,) = omni.generate(prompt, params)
        with pytest.raises(InvalidRequestError, match="got none"):
            omni.generate(PROMPT, params)
    assert output.images[0].shape == (9, 64, 64, 3)
    pipeline, arguments = pipeline_of(LTX), {"image": image, "num_frames": 9}
    assert psnr(output.images[0], filmed(pipeline, 1, frame_rate=8, **arguments)) >= 60
    assert psnr(output.images[0], filmed(pipeline, 1, frame_rate=25, **arguments)) < 60


def test_an_abort_ends_a_video_and_the_next_one_is_made(model_of: ModelOf, pipeline_of: PipelineOf) -> None:
    async def run() -> np.ndarray:
        omni = AsyncOmni(model=str(model_of(SKY_REELS)), distributed_executor_backend="uni")
        await omni.start()
        long = omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=1, num_inference_steps=50), "long")
        short = omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=2, output_type="np", **LIMITS))
        assert [(await anext(long)).step for _ in range(2)] == [0, 1]
        omni.abort("long")
        with pytest.raises(RequestAbortedError):
            async for _ in long:
                pass
        (*_, last) = [output async for output in short]
        await omni.close()
        frames: np.ndarray = last.images[0]
        return frames

    assert psnr(asyncio.run(run()), filmed(pipeline_of(SKY_REELS), 2)) >= 60


def test_a_video_is_priced_by_its_latent_frames(model_of: ModelOf) -> None:
    info = load_model_info(str(model_of(SKY_REELS)))
    assert info.makes_videos
    assert info.frame_multiple == 4
    assert [info.num_image_tokens(64, 64, frames) for frames in (1, 5, 81)] == [16, 32, 21 * 16]


@pytest.fixture(scope="module")
def omni(model_of: ModelOf) -> Any:
    """With the server's limits, which are not those of `Omni`."""
    with Omni(model=str(model_of(SKY_REELS)), distributed_executor_backend="uni", max_num_frames=9) as omni:
        yield omni


@pytest.mark.parametrize(
    ("num_frames", "words"),
    [
        (13, r"is more than 9 \(--max-num-frames\); the nearest valid number is 9"),
        (0, "not at least 1; the nearest valid number is 1"),
        (6, "1 more than a multiple of 4; the nearest valid number is 5"),
    ],
)
def test_frames_that_the_model_does_not_make_are_refused(omni: Omni, num_frames: int, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        omni.generate(PROMPT, OmniDiffusionSamplingParams(num_frames=num_frames))
    assert caught.value.param == "num_frames"


def test_a_server_makes_as_many_frames_as_the_model_by_default(model_of: ModelOf) -> None:
    model = str(model_of(SKY_REELS))
    builder = RequestBuilder(OmniDiffusionConfig(model), load_model_info(model), READY)
    (request,) = builder.build(OmniPrompt(PROMPT), OmniDiffusionSamplingParams(guidance_scale=1.0), "r")
    assert request.request.num_frames == 5
    assert request.cost.branch_tokens == (2 * 16 + request.num_prompt_tokens,)
    with pytest.raises(InvalidRequestError, match=r"num_frames 9 is more than 5 \(--max-num-frames\)"):
        builder.build(OmniPrompt(PROMPT), OmniDiffusionSamplingParams(num_frames=9), "r")


def test_fps_is_refused_where_the_pipeline_asks_for_none(omni: Omni) -> None:
    with pytest.raises(InvalidRequestError, match="no such parameter") as caught:
        omni.generate(PROMPT, OmniDiffusionSamplingParams(fps=16))
    assert caught.value.param == "fps"


def test_a_limit_below_the_models_own_number_ends_the_start(model_of: ModelOf) -> None:
    with pytest.raises(ConfigError, match="--max-num-frames 1 refuses the model's own default"):
        AsyncOmni(model=str(model_of(SKY_REELS)), max_num_frames=1)
