"""The embedded demo model: small enough to ship, loadable by diffusers, and what it draws is what was asked for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vllm_omni

MODEL = Path(vllm_omni.__file__).parent / "demo_model"
THUMBNAILS = Path(__file__).with_name("thumbnails.npz")
LIMIT = 20 * 10**6


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from tools.demo_model.sampling import load_pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_pipeline(MODEL, "cpu")


@pytest.fixture(scope="module")
def sprites() -> Any:
    from tools.demo_model.scenes import Sprites

    with np.load(THUMBNAILS) as file:
        return Sprites.from_rgba(file["rgba"], torch.device("cpu"))


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= LIMIT


def test_its_configs_name_no_paths() -> None:
    for file in MODEL.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text()), file


def test_the_pipelines_drop_whole_templates(pipeline: Any) -> None:
    template = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(template).input_ids) == pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("size", [(64, 64)])
def test_pictures_show_what_was_asked_for(pipeline: Any, sprites: Any, size: tuple[int, int]) -> None:
    from tools.demo_model import judge
    from tools.demo_model.sampling import generate
    from tools.demo_model.vocabulary import THINGS

    wanted = {
        "red apple": "white",
        "a strawberry on a black background": "black",
        "a lemon on a purple background": "purple",
        "a hamburger on a blue background": "blue",
    }
    made = generate(pipeline, list(wanted), size, seed=0, steps=8)
    pictures = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255
    things = [THINGS[i] for i in judge.best_fit(pictures, sprites, pair=False).things.tolist()]
    assert things == ["red apple", "strawberry", "lemon", "hamburger"]
    assert judge.nearest_background(judge.border_shade(pictures)) == list(wanted.values())


def test_captions_say_where_things_are() -> None:
    from tools.demo_model.vocabulary import SIDE_BY_SIDE, THINGS, Scene, caption

    apple, lemon = THINGS.index("red apple"), THINGS.index("lemon")
    scene = Scene((apple, lemon), SIDE_BY_SIDE, "blue")
    texts = {caption(scene, np.random.default_rng(seed)) for seed in range(50)}
    assert "a red apple left of a lemon on a blue background" in texts
    assert "a lemon right of a red apple on a blue background" in texts
    assert not any("lemon left of" in text or "apple right of" in text for text in texts)
