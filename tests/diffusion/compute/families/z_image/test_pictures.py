"""Whole pictures against diffusers' ZImagePipeline, made in one mixed batch that requests join and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from testbed.fakes import make_ready
from testbed.runner_driver import Drive, make_request, psnr, scheduler_of
from tests.diffusion.compute.families.qwen_image.test_pictures import check, started
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

LONG_PROMPT = "a photo of a red apple on a blue car, " * 12


def reference(path: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: ZImagePipeline, request: DiffusionRequest) -> np.ndarray:
    """float32 [height, width, 3] in [0, 1]."""
    with scheduler_of(pipeline, request):
        images = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.true_cfg_scale - 1 if request.has_guidance else 0.0,
            cfg_normalization=request.cfg_normalization,
            cfg_truncation=request.cfg_truncation,
            sigmas=None if request.sigmas is None else list(request.sigmas),
            max_sequence_length=request.max_sequence_length,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
        ).images
    picture: np.ndarray = images[0]
    return picture


def guided(request_id: str, scale: float, **changes: Any) -> DiffusionRequest:
    """scale: diffusers' guidance_scale."""
    return make_request(request_id, true_cfg_scale=1 + scale, **{"negative_prompt": "", **changes})


def check_batch(path: Path, arrivals: dict[int, list[DiffusionRequest]], least_sequences: int) -> None:
    drive = Drive(started(path)).run(arrivals)
    assert drive.errors == {}
    assert max(drive.pack_sizes) >= least_sequences
    pipeline = reference(path)
    for request in [r for joining in arrivals.values() for r in joining]:
        check(drive.images[request.request_id], draw(pipeline, request))


@pytest.mark.parametrize("model", ["turbo", "base"])
def test_a_mixed_batch_draws_what_diffusers_draws(model: str, request: pytest.FixtureRequest) -> None:
    arrivals = {
        0: [
            guided("guided", 5.0, negative_prompt="a blue car", seed=3),
            make_request("wide", prompt="a photo", height=32, width=96, num_inference_steps=7, seed=2**40),
        ],
        1: [guided("long", 0.5, prompt=LONG_PROMPT, num_inference_steps=2)],
        3: [
            make_request("tall", prompt="apple", height=80, width=48, num_inference_steps=5, seed=9),
            make_request("cut", prompt=LONG_PROMPT, max_sequence_length=20, num_inference_steps=2),
            make_request("own sigmas", sigmas=(1.0, 0.6, 0.3), num_inference_steps=3),
            guided("one step", 3.0, num_inference_steps=1, seed=4),
            guided("shift", 3.0, flow_shift=1.5, num_inference_steps=3),
            make_request("shifted sigmas", sigmas=(0.9, 0.5), flow_shift=0.4, num_inference_steps=2),
            make_request("empty", prompt="", height=16, width=16, num_inference_steps=2),
        ],
    }
    check_batch(request.getfixturevalue(model), arrivals, least_sequences=8)


def test_guidance_is_truncated_and_normalised_as_in_diffusers(base: Path) -> None:
    """In one batch; guidance ends at different steps."""
    requests = [
        guided("normalised", 5.0, cfg_normalization=1.0, num_inference_steps=4),
        guided("held short", 5.0, cfg_normalization=0.5, num_inference_steps=4),
        guided("not held", 0.5, cfg_normalization=50.0, num_inference_steps=3),
        guided("ends early", 5.0, cfg_truncation=0.1, num_inference_steps=6),
        guided("ends late", 4.0, cfg_truncation=0.5, cfg_normalization=1.0, num_inference_steps=8, height=48),
        guided("first step alone", 4.0, cfg_truncation=0.0, num_inference_steps=3, negative_prompt="car"),
    ]
    check_batch(base, {0: requests}, least_sequences=12)
    pipeline = reference(base)
    pictures = [
        draw(pipeline, guided("x", 5.0, num_inference_steps=4, **changes))
        for changes in ({}, {"cfg_normalization": 0.5}, {"cfg_truncation": 0.1})
    ]
    for changed in pictures[1:]:
        assert np.abs(changed - pictures[0]).max() > 0.05, "the parameter must show in the picture"


@pytest.mark.parametrize("model", ["turbo", "base"])
def test_defaults_draw_what_diffusers_draws_with_its_own(model: str, request: pytest.FixtureRequest) -> None:
    """Z-Image-Turbo without guidance in 8 steps, Z-Image as the pipeline's signature has it."""
    path: Path = request.getfixturevalue(model)
    runner = started(path)
    builder = RequestBuilder(OmniDiffusionConfig(model=str(path)), load_model_info(str(path)), make_ready())
    (resolved,) = builder.build(OmniPrompt("a red apple"), OmniDiffusionSamplingParams(seed=5), "r")
    drive = Drive(runner).run({0: [resolved.request]})
    pipeline = reference(path)
    settings = {"num_inference_steps": 8, "guidance_scale": 0.0} if model == "turbo" else {}
    wanted = pipeline(
        "a red apple",
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **settings,
    ).images[0]
    check(drive.images["r-0"], wanted)
    assert resolved.num_steps == pipeline.num_timesteps == len(drive.pack_sizes) - 3
    assert resolved.cost.branch_tokens == tuple([32 + 32] * (1 if model == "turbo" else 2))


def test_slicing_keeps_the_picture(turbo: Path) -> None:
    requests = [make_request(f"{i}", seed=i, num_inference_steps=2) for i in range(3)]
    batched = Drive(started(turbo)).run({0: requests})
    sliced = Drive(started(turbo, vae_use_slicing=True)).run({0: requests})
    for request in requests:
        assert psnr(batched.images[request.request_id], sliced.images[request.request_id]) >= 60


def test_tiles_are_those_of_diffusers(turbo: Path) -> None:
    request = make_request("large", height=112, width=144, num_inference_steps=1)
    drive = Drive(started(turbo, vae_use_tiling=True)).run({0: [request]})
    pipeline = reference(turbo)
    whole = draw(pipeline, request)
    pipeline.vae.enable_tiling()
    tiled = draw(pipeline, request)
    assert np.abs(whole - tiled).max() > 0.01, "tiling must show in this picture"
    check(drive.images["large"], tiled)


def test_previews_are_predictions_of_the_picture(turbo: Path) -> None:
    request = make_request("r", num_inference_steps=6, preview_steps=(2, 5))
    drive = Drive(started(turbo)).run({0: [request]})
    early, late = (psnr(preview, drive.images["r"]) for preview in drive.previews["r"])
    assert early < late
    assert late > 20
