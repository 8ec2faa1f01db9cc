"""The embedded video model: small enough to ship, and its videos show what was asked for."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tools.demo_model.card import hashes
from tools.demo_model.judge import nearest_background
from tools.demo_model.sampling import load_pipeline
from tools.demo_model.scenes import Sprites
from tools.demo_model.vocabulary import THINGS
from tools.demo_video import judge, network
from tools.demo_video.evaluate import as_clips
from tools.demo_video.motions import FRAMES, SIDE
from tools.demo_video.sampling import generate

from testbed.runner_driver import QUICK, Drive, make_request, psnr
from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.find_folder import EMBEDDED_MODELS
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = EMBEDDED_MODELS["demo-video"]
LIMIT = 16 * 10**6


@pytest.fixture(scope="module")
def pipeline() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_pipeline(MODEL, "cpu")


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= LIMIT


def test_its_configs_name_no_paths() -> None:
    for file in MODEL.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text()), file


def test_its_defaults_are_those_of_the_training() -> None:
    assert read_default_sampling_params(MODEL) == network.DEFAULTS


def test_its_tokenizer_is_that_of_the_training(pipeline: Any) -> None:
    text = "Two red apples crossing on a blue background."
    assert pipeline.tokenizer(text).input_ids == network.build_tokenizer()(text).input_ids


def shown(pixels: np.ndarray, thumbnails: Sprites) -> list[tuple[str, str, str]]:
    """Thing, motion and background of each video, uint8 [videos, frames, height, width, 3]."""
    clips = as_clips(pixels, torch.device("cpu"))
    things, motions = judge.judge_singles(clips, thumbnails)
    backgrounds = nearest_background(judge.clip_shade(clips))
    return list(zip([THINGS[thing] for thing in things], motions, backgrounds, strict=True))


def test_its_card_is_about_these_weights() -> None:
    assert hashes(MODEL) in (MODEL / "README.md").read_text()


def test_videos_are_those_of_diffusers_and_show_what_was_asked_for(pipeline: Any, thumbnails: Sprites) -> None:
    wanted = {
        "a red apple moving right": ("red apple", "moving right", "white"),
        "a blue heart growing on a yellow background": ("blue heart", "growing", "yellow"),
    }
    steps = 6
    fields: dict[str, Any] = {
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "true_cfg_scale": network.GUIDANCE,
        "negative_prompt": "",
        "max_sequence_length": network.CAPTION_TOKENS,
    }
    requests = [make_request(prompt, prompt, seed=seed, **fields) for seed, prompt in enumerate(wanted)]
    config = OmniDiffusionConfig(model="demo-video")
    runner = ModelRunner(config, load_model_info(config.model), options=QUICK)
    runner.start()
    drive = Drive(runner).run({0: requests})
    videos = np.stack([drive.images[prompt] for prompt in wanted])
    reference = generate(pipeline, list(wanted), seed=0, steps=steps)
    assert videos.shape == reference.shape == (len(wanted), FRAMES, SIDE, SIDE, 3)
    assert psnr(videos, reference) >= 60
    assert shown(videos, thumbnails) == list(wanted.values())


@pytest.mark.thorough
def test_videos_of_more_motions(pipeline: Any, thumbnails: Sprites) -> None:
    wanted = {
        "a strawberry jumping on a black background": ("strawberry", "jumping", "black"),
        "a panda fading in on a pink background": ("panda", "fading in", "pink"),
        "a bell swinging": ("bell", "swinging", "white"),
        "a rocket moving up on a blue background": ("rocket", "moving up", "blue"),
    }
    assert shown(generate(pipeline, list(wanted), seed=0, steps=12), thumbnails) == list(wanted.values())
