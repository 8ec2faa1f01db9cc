"""The embedded demo model: small enough to ship, loadable by diffusers, and what it draws is what was asked for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from tests.demo_model.conftest import MODEL

LIMIT = 20 * 10**6


def test_it_is_small_enough_to_ship() -> None:
    from tools.demo_model.card import files_of

    assert sum(file.stat().st_size for file in files_of(MODEL)) <= LIMIT


def test_its_configs_name_no_paths() -> None:
    for file in MODEL.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text()), file


def test_the_pipelines_drop_whole_templates(pipeline: Any) -> None:
    template = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(template).input_ids) == pipeline.prompt_template_encode_start_idx


def drawn(pipeline: Any, prompts: list[str], size: tuple[int, int]) -> torch.Tensor:
    from tools.demo_model.sampling import generate

    return torch.from_numpy(np.stack(generate(pipeline, prompts, size, seed=0, steps=8))).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 80)])
def test_pictures_show_what_was_asked_for(pipeline: Any, sprites: Any, size: tuple[int, int]) -> None:
    from tools.demo_model import judge
    from tools.demo_model.vocabulary import THINGS

    wanted = {
        "red apple": "white",
        "a strawberry on a black background": "black",
        "a lemon on a purple background": "purple",
        "a hamburger on a blue background": "blue",
    }
    pictures = drawn(pipeline, list(wanted), size)
    things = [THINGS[i] for i in judge.best_fit(pictures, sprites, pair=False).things.tolist()]
    assert things == ["red apple", "strawberry", "lemon", "hamburger"]
    assert judge.nearest_background(judge.border_shade(pictures)) == list(wanted.values())


@pytest.mark.parametrize(("words", "stacked"), [(("left of", "right of"), False), (("above", "below"), True)])
def test_two_things_stand_where_they_were_put(pipeline: Any, sprites: Any, words: Any, stacked: bool) -> None:
    from tools.demo_model import judge
    from tools.demo_model.vocabulary import THINGS

    pictures = drawn(pipeline, [f"a red apple {word} a blue heart" for word in words], (96, 96))
    found = [judge.best_fit(half, sprites, pair=True).things.tolist() for half in judge.halves(pictures, stacked)]
    names = [[THINGS[i] for i in pair] for pair in zip(*found, strict=True)]
    assert names == [["red apple", "blue heart"], ["blue heart", "red apple"]]


def test_seeds_differ_in_place_and_shade(pipeline: Any, sprites: Any) -> None:
    from tools.demo_model import judge

    pictures = drawn(pipeline, ["a sailboat on a blue background"] * 6, (64, 64))
    found = judge.best_fit(pictures, sprites, pair=False)
    assert found.x.std() + found.y.std() > 0.02
    assert judge.border_shade(pictures).mean(1).std() > 0.01


def test_the_training_computes_what_the_pipeline_computes(pipeline: Any, real_rotation: None) -> None:
    from tools.demo_model import denoiser

    texts = ["a red apple left of a blue heart on an orange background", "books", "", " "]
    encoder = denoiser.CaptionEncoder(pipeline.text_encoder, pipeline.tokenizer)
    model = denoiser.FlowMatching(pipeline.vae, encoder, pipeline.transformer, draws=1)
    latents, time = torch.randn(4, 24, 64), torch.tensor([0.1, 0.3, 0.5, 0.75])
    with torch.no_grad():
        states, kept = encoder(denoiser.caption_tokens(pipeline.tokenizer)(texts))
        wanted_states, wanted_mask = pipeline.encode_prompt(texts, device="cpu")
        velocity = model.velocity(latents, time, states, kept, (4, 6))
        wanted = pipeline.transformer(
            hidden_states=latents,
            timestep=time,
            encoder_hidden_states=wanted_states,
            encoder_hidden_states_mask=wanted_mask,
            img_shapes=[[(1, 4, 6)]] * 4,
            return_dict=False,
        )[0]
    assert torch.allclose(states[:, : wanted_states.shape[1]], wanted_states, atol=1e-5)
    assert torch.allclose(velocity, wanted, atol=1e-4)


def test_every_scene_follows_from_seed_and_step() -> None:
    from tools.demo_model.scenes import plan_batch

    first, second, other = (plan_batch(1, step, 8) for step in (5, 5, 6))
    assert first.captions == second.captions
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
    assert not torch.equal(first.numbers, other.numbers)


def test_captions_say_where_things_are() -> None:
    from tools.demo_model.vocabulary import SIDE_BY_SIDE, THINGS, Scene, caption

    apple, lemon = THINGS.index("red apple"), THINGS.index("lemon")
    scene = Scene((apple, lemon), SIDE_BY_SIDE, "blue")
    texts = {caption(scene, np.random.default_rng(seed)) for seed in range(50)}
    assert "a red apple left of a lemon on a blue background" in texts
    assert "a lemon right of a red apple on a blue background" in texts
    assert not any("lemon left of" in text or "apple right of" in text for text in texts)
