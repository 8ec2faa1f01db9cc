"""The embedded video model: small enough to ship, and its videos show what was asked for."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from tools.demo_model.judge import nearest_background
from tools.demo_model.sampling import load_pipeline
from tools.demo_model.scenes import Sprites
from tools.demo_model.vocabulary import THINGS
from tools.demo_video import judge, network
from tools.demo_video.evaluate import as_clips
from tools.demo_video.motions import FRAMES
from tools.demo_video.sampling import generate

from vllm_omni.diffusion.catalog.default_params import read_default_sampling_params
from vllm_omni.diffusion.catalog.find_folder import EMBEDDED_MODELS

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


def test_videos_show_what_was_asked_for(pipeline: Any, thumbnails: Sprites) -> None:
    wanted = {
        "a red apple moving right": ("red apple", "moving right", "white"),
        "a strawberry jumping on a black background": ("strawberry", "jumping", "black"),
        "a blue heart growing on a yellow background": ("blue heart", "growing", "yellow"),
        "a panda fading in on a pink background": ("panda", "fading in", "pink"),
    }
    pixels = generate(pipeline, list(wanted), seed=0, steps=12)
    assert pixels.shape == (len(wanted), FRAMES, 64, 64, 3)
    clips = as_clips(pixels, torch.device("cpu"))
    things, motions = judge.judge_singles(clips, thumbnails)
    backgrounds = nearest_background(judge.clip_shade(clips))
    found = zip([THINGS[thing] for thing in things], motions, backgrounds, strict=True)
    assert list(found) == list(wanted.values())
