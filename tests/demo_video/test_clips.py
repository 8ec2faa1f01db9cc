"""Clips of the video model: what they show follows from a seed, fits their captions, and is seen by the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tools.demo_model.card import hashes
from tools.demo_model.scenes import Sprites, place
from tools.demo_model.vocabulary import BACKGROUNDS, THINGS
from tools.demo_video import card, evaluate, judge, network, sampling
from tools.demo_video.autoencoder import on_device
from tools.demo_video.clips import ClipPlan, crossing_tracks, plan_clips, track_of
from tools.demo_video.motions import CROSSING, FRAMES, MOTIONS, ROUND, STILL, can_show, caption, plural
from transformers import AutoTokenizer

NAMES = list(MOTIONS)


def few(sprites: Sprites) -> Sprites:
    """Some of the drawings, among which the judge finds the right one faster."""
    return Sprites(sprites.full[:12])


def plan_of(motions: list[str], seed: int = 0) -> ClipPlan:
    """Plan with these motions, of one thing each, which are among the first twelve."""
    plan = plan_clips(seed, 0, len(motions))
    plan.footage = type(plan.footage)(singles=len(motions))
    plan.motions = torch.tensor([NAMES.index(name) for name in motions])
    plan.things = torch.arange(2 * len(motions)).view(-1, 2) % 12
    return plan


def tracks(motion: str, count: int = 50, frames: int = FRAMES) -> Any:
    numbers = torch.rand(7, count, generator=torch.Generator().manual_seed(0))
    return track_of(torch.full((count,), NAMES.index(motion)), numbers, frames)


def test_every_clip_follows_from_seed_and_step() -> None:
    first, second, other = (plan_clips(1, step, 40) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
    assert first.captions(np.random.default_rng(0)) == second.captions(np.random.default_rng(0))
    assert not torch.equal(first.numbers, other.numbers)


def test_a_plan_has_what_can_be_seen() -> None:
    plan = plan_clips(2, 0, 2000)
    names = [NAMES[i] for i in plan.motions.tolist()]
    assert names.count(CROSSING) == plan.footage.crossings == 240
    assert set(names[: plan.footage.singles]) == set(NAMES) - {CROSSING}
    assert all(can_show(name, thing) for name, thing in zip(names, plan.things[:, 0].tolist(), strict=True))
    assert set(plan.things[:, 0].tolist()) == set(range(len(THINGS)))
    assert len(set(plan.backgrounds.tolist())) == len(BACKGROUNDS)


@pytest.mark.parametrize(
    ("motion", "value", "sign"),
    [
        ("moving right", "x", 1),
        ("moving left", "x", -1),
        ("moving down", "y", 1),
        ("moving up", "y", -1),
        ("growing", "size", 1),
        ("shrinking", "size", -1),
        ("spinning", "angle", 1),
        ("fading in", "opacity", 1),
        ("fading out", "opacity", -1),
    ],
)
def test_a_motion_changes_its_value_alone(motion: str, value: str, sign: int) -> None:
    moving, still = tracks(motion), tracks(STILL)
    for name in ("x", "y", "size", "angle", "opacity"):
        change = getattr(moving, name).expand(50, FRAMES).diff(dim=1)
        if name == value:
            assert (sign * change >= 0).all()
            assert (sign * change.sum(1) > 0.25).all()
        else:
            assert not change.any()
        assert not getattr(still, name).expand(50, FRAMES).diff(dim=1).any()


@pytest.mark.parametrize("motion", NAMES)
def test_things_stay_inside(motion: str) -> None:
    found = tracks(motion)
    half = found.size.amax(1, keepdim=True) / 2
    if motion == CROSSING:
        upper, lower = crossing_tracks(torch.full((50,), NAMES.index(motion)), torch.rand(7, 50), FRAMES)
        assert (upper.x.diff(dim=1) > 0).all()
        assert (lower.x.diff(dim=1) < 0).all()
        assert (upper.y + upper.size / 2 <= 1e-6).all()
        assert (lower.y - lower.size / 2 >= -1e-6).all()
    else:
        assert (found.x.abs() + half <= 0.5 + 1e-6).all()
        assert (found.y.abs() + half <= 0.5 + 1e-6).all()


def test_jumps_and_bounces_are_told_apart() -> None:
    jump, bounce = tracks("jumping").y, tracks("bouncing").y
    assert (jump[:, 8] < jump[:, 0] - 0.25).all()
    assert (bounce[:, 8] < bounce[:, 4] - 0.15).all()
    assert (bounce[:, 4] > bounce[:, 0] + 0.25).all()


def test_round_things_look_alike_turned(thumbnails: Sprites) -> None:
    count = len(THINGS)
    turned = [
        place(
            thumbnails.at(32), (32, 32), torch.full((count,), 0.7), torch.full((count,), angle), torch.zeros(count, 2)
        )
        for angle in (0.0, *torch.arange(1, 6).mul(torch.pi / 3).tolist())
    ]
    change = torch.stack([(other - turned[0]).square().sum((1, 2, 3)) for other in turned[1:]]).amax(0)
    part = change / turned[0].square().sum((1, 2, 3))
    assert max(part[THINGS.index(label)] for label in ROUND) < 0.12
    assert part[THINGS.index("panda")] > 0.2


def test_captions_say_what_is_seen() -> None:
    apple, star = THINGS.index("red apple"), THINGS.index("star")

    def texts(things: tuple[int, int], motion: str, background: str = "orange") -> set[str]:
        return {caption(things, motion, background, np.random.default_rng(seed)) for seed in range(200)}

    assert "a red apple jumping on an orange background" in texts((apple, apple), "jumping")
    assert "A red apple hopping on an orange background." in texts((apple, apple), "jumping")
    assert "two stars crossing on an orange background" in texts((star, star), CROSSING)
    assert "a red apple and a star crossing on an orange background" in texts((apple, star), CROSSING)
    assert {"a red apple", "a red apple standing still"} <= texts((apple, apple), STILL, "white")


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("strawberry", "strawberries"),
        ("fox", "foxes"),
        ("maple leaf", "maple leaves"),
        ("toy", "toys"),
        ("socks", None),
    ],
)
def test_plurals(name: str, many: str | None) -> None:
    assert plural(name) == many


def test_captions_are_whole_words_to_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = network.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    texts = plan_clips(3, 0, 500).captions(np.random.default_rng(1))
    texts += [clip.prompt for clip in evaluate.wanted_clips(0, 200)] + sampling.SAMPLES
    for text in texts:
        ids = saved(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + text.endswith(".") + 1, text
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= network.CAPTION_TOKENS
    assert tokenizer.unk_token_id not in saved("Zebras, 7!").input_ids


def test_the_judge_sees_every_true_motion(thumbnails: Sprites) -> None:
    sprites = few(thumbnails)
    motions = [name for name in NAMES if name != CROSSING]
    plan = plan_of(motions, seed=4)
    clips = on_device(plan, sprites) / 2 + 0.5
    things, found = judge.judge_singles(clips, sprites)
    assert found == motions
    assert things == plan.things[:, 0].tolist()


def test_the_judge_follows_the_pixels(thumbnails: Sprites) -> None:
    sprites = few(thumbnails)
    clip = on_device(plan_of(["moving right"]), sprites) / 2 + 0.5
    things = torch.zeros(1, dtype=torch.long)
    for changed, motion in ((clip.flip(2), "moving left"), (clip[:, :, :1].expand_as(clip), STILL)):
        assert judge.name_motion(judge.measure_track(changed, things, sprites), 0) == motion
    _, moves = judge.judge_crossings(clip, sprites)
    assert moves == [STILL]


def test_true_crossings_are_seen(thumbnails: Sprites) -> None:
    sprites = few(thumbnails)
    plan = plan_clips(5, 0, 9)
    plan.footage = type(plan.footage)(singles=0, crossings=2)
    plan.things, plan.motions = torch.tensor([[1, 7], [3, 3]]), torch.full((2,), NAMES.index(CROSSING))
    plan.backgrounds, plan.numbers = plan.backgrounds[:2], plan.numbers[:, :2]
    wanted = [evaluate.Wanted((1, 7), CROSSING, "white"), evaluate.Wanted((3, 3), CROSSING, "white")]
    clips = on_device(plan, sprites) / 2 + 0.5
    assert evaluate.score(clips, wanted, sprites)["thing"] == 100
    scores = evaluate.score(clips.flip(2), wanted, sprites)
    assert scores["thing"] == 100
    assert scores["motion"] == 0
    assert len(scores["wrong"]) == 2


def test_prompts_have_all_motions_equally_often() -> None:
    wanted = evaluate.wanted_clips(1, 130)
    counts = {motion: sum(clip.motion == motion for clip in wanted) for motion in evaluate.MEASURED}
    assert set(counts.values()) == {10}
    assert len({clip.things[0] for clip in wanted}) > 80
    assert all(can_show(clip.motion, clip.things[0]) for clip in wanted)


def test_sheets_and_previews(tmp_path: Path) -> None:
    clips = np.random.default_rng(0).integers(0, 255, (3, FRAMES, 8, 8, 3), np.uint8)
    sheet = sampling.contact_sheet(clips, ["a red apple moving right on a blue background"] * 3)
    assert sheet.size == (150 + 9 * 10, 3 * 10)
    assert np.array_equal(np.asarray(sheet)[10:18, 160:168], clips[1, 2])
    for name in ("clip.webp", "clip.gif"):
        sampling.save_preview(clips, tmp_path / name, columns=2)
        with Image.open(tmp_path / name) as saved:
            assert (saved.size, saved.n_frames) == ((32, 32), FRAMES)


def test_the_card_has_the_numbers(tmp_path: Path) -> None:
    for folder, config in (("transformer", {"num_layers": 8}), ("text_encoder", {"vocab_size": 858})):
        (tmp_path / folder).mkdir()
        config |= {"num_attention_heads": 4, "attention_head_dim": 48}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "default_sampling_params.json").write_text(json.dumps(network.DEFAULTS))
    (tmp_path / "vae.safetensors").write_bytes(b"weights")
    scores = {"clips": 100, "thing": 97.0, "motion": 93.4, "background": 100.0, "motions": {"jumping": 88.0}}
    numbers = {"prompts": 100, "true clips": scores, "reconstructions": scores | {"psnr": 29.5}, "labels": scores}
    numbers |= {"steps": {"8": scores}, "guidance": {"1.0": scores}, "variety": 0.05}
    text = card.card(tmp_path, numbers, "One command.\n", "- Eyes are smudged.\n")
    assert "| **prompts, 20 steps, guidance 3.0** | 100 | 97 % | 93 % | 100 % |" in text
    assert "jumping 88 %" in text
    assert "(deviation 5% of the width)" in text
    assert "29.5 dB" in text
    assert "- Eyes are smudged." in text
    assert hashes(tmp_path) in text
