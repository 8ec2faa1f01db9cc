"""Whole pictures against diffusers' QwenImagePipeline, made in one mixed batch that requests join and leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from testbed.runner_driver import QUICK, Drive, make_request, psnr, scheduler_of
from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

LONG_PROMPT = "a photo of a red apple on a blue car, " * 12


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def started(path: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(path), **settings), load_model_info(str(path)), options=QUICK)
    runner.start()
    return runner


def reference(path: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: QwenImagePipeline, request: DiffusionRequest) -> np.ndarray:
    """float32 [height, width, 3] in [0, 1]."""
    with scheduler_of(pipeline, request):
        images = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            true_cfg_scale=request.true_cfg_scale,
            sigmas=None if request.sigmas is None else list(request.sigmas),
            max_sequence_length=request.max_sequence_length,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
        ).images
    picture: np.ndarray = images[0]
    return picture


def check(picture: np.ndarray, wanted: np.ndarray) -> None:
    assert picture.dtype == np.uint8
    assert picture.shape == wanted.shape
    assert psnr(picture, (wanted * 255).round().astype(np.uint8)) >= 60
    assert np.abs(picture / 255 - wanted).max() <= 0.5 / 255 + 1e-3
    assert wanted.std() > 0.02, "a flat picture proves nothing"


def test_a_mixed_batch_draws_what_diffusers_draws(tiny_model: Path) -> None:
    arrivals = {
        0: [
            make_request("guided", negative_prompt="a blue car", seed=3),
            make_request("wide", "a photo", height=32, width=96, num_inference_steps=7, seed=2**40),
        ],
        1: [make_request("long", LONG_PROMPT, negative_prompt="", true_cfg_scale=2.5, num_inference_steps=2)],
        3: [
            make_request("scale of 1", "blue", negative_prompt="red", true_cfg_scale=1.0, num_inference_steps=3),
            make_request("tall", "apple", negative_prompt=" ", height=80, width=48, num_inference_steps=5, seed=9),
            make_request("cut", LONG_PROMPT, max_sequence_length=20, num_inference_steps=2),
            make_request("own sigmas", sigmas=(1.0, 0.6, 0.3), num_inference_steps=3),
            make_request("shift", negative_prompt="red", flow_shift=3.0, num_inference_steps=3),
            make_request("shifted sigmas", sigmas=(0.9, 0.5), flow_shift=0.4, num_inference_steps=2),
        ],
    }
    drive = Drive(started(tiny_model)).run(arrivals)

    assert drive.errors == {}
    assert max(drive.pack_sizes) >= 8
    pipeline = reference(tiny_model)
    for request in [r for joining in arrivals.values() for r in joining]:
        check(drive.images[request.request_id], draw(pipeline, request))
    shifted = arrivals[3][-2]
    assert psnr(drive.images["shift"], (draw(pipeline, replace(shifted, flow_shift=None)) * 255).round()) < 40


def test_the_demo_model_draws_what_diffusers_draws() -> None:
    requests = [
        make_request("apple", "red apple", negative_prompt="", true_cfg_scale=3.0, num_inference_steps=6),
        make_request("panda", "a panda on a pink background", seed=5, num_inference_steps=6),
    ]
    drive = Drive(started(DEMO_MODEL_PATH)).run({0: requests})
    pipeline = reference(DEMO_MODEL_PATH)
    for request in requests:
        check(drive.images[request.request_id], draw(pipeline, request))


def test_slicing_keeps_the_picture(tiny_model: Path) -> None:
    requests = [make_request(f"{i}", seed=i, num_inference_steps=2) for i in range(3)]
    batched = Drive(started(tiny_model)).run({0: requests})
    sliced = Drive(started(tiny_model, vae_use_slicing=True)).run({0: requests})
    for request in requests:
        assert psnr(batched.images[request.request_id], sliced.images[request.request_id]) >= 60


def test_tiles_are_those_of_diffusers(tiny_model: Path) -> None:
    request = make_request("large", height=272, width=288, num_inference_steps=1, sigmas=(0.9,))
    drive = Drive(started(tiny_model, vae_use_tiling=True)).run({0: [request]})
    pipeline = reference(tiny_model)
    whole = draw(pipeline, request)
    pipeline.vae.enable_tiling()
    tiled = draw(pipeline, request)
    assert np.abs(whole - tiled).max() > 0.01, "tiling must show in this picture"
    check(drive.images["large"], tiled)


def test_a_single_step_goes_from_noise_to_picture(tiny_model: Path) -> None:
    """diffusers' schedule is 0 / 0 there; with a terminal of none it is sigma 1, then 0."""
    request = make_request("one", num_inference_steps=1, seed=4)
    drive = Drive(started(tiny_model)).run({0: [request]})
    pipeline = reference(tiny_model)
    pipeline.scheduler.register_to_config(shift_terminal=None)
    check(drive.images["one"], draw(pipeline, request))
