"""Measure a saved video model; write the numbers, a contact sheet and an animated preview.

python -m tools.demo_video.evaluate --model src/vllm_omni/demo_video --out .demo-data/video-evaluation --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..demo_model import drawings
from ..demo_model.evaluate import chosen, share, with_article
from ..demo_model.judge import nearest_background
from ..demo_model.sampling import load_pipeline
from ..demo_model.scenes import Sprites
from ..demo_model.vocabulary import BACKGROUNDS, THINGS, add_article
from . import judge
from .autoencoder import on_device
from .clips import plan_clips
from .motions import CAN_CROSS_ITSELF, CROSSING, FRAMES, MOTIONS, STILL, can_show, plural
from .network import GUIDANCE, STEPS
from .sampling import SAMPLES, contact_sheet, generate, save_preview

PROMPTS = 100
GOAL = 90  # percent of right things, and of right motions
MEASURED = tuple(name for name in MOTIONS if name != STILL)


@dataclass(frozen=True)
class Wanted:
    """One prompt, and what its clip has to show."""

    things: tuple[int, int]  # upper and lower of two crossing things; else the same one twice
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        first, second = self.things
        if self.motion != CROSSING:
            text = f"{with_article(first)} {self.motion}"
        elif first != second:
            text = f"{with_article(first)} and {with_article(second)} crossing"
        else:
            text = f"two {plural(THINGS[first])} crossing"
        if self.background == "white":
            return text
        return f"{text} on {add_article(self.background, self.background)} background"


def wanted_clips(seed: int, count: int, motions: Sequence[str] = MEASURED) -> list[Wanted]:
    """Prompts with all motions equally often and each thing at most once more than another; half are on white."""
    rng = np.random.default_rng(seed)
    things = chosen(rng, 2 * count)
    names = list(BACKGROUNDS)
    wanted = []
    for i in range(count):
        motion = motions[i % len(motions)]
        if motion == CROSSING:
            first, second = things.pop(), things.pop()
            if rng.random() < 0.5 or first == second:
                first = second = int(rng.choice([k for k in CAN_CROSS_ITSELF if plural(THINGS[k])]))
            pair = (first, second)
        else:
            fitting = next(k for k in reversed(range(len(things))) if can_show(motion, things[k]))
            pair = (things[fitting], things.pop(fitting))
        background = "white" if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
        wanted.append(Wanted(pair, motion, background))
    return wanted


def as_clips(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Clips in [0, 1], [n, 3, frames, height, width], from uint8 [n, frames, height, width, 3]."""
    return torch.from_numpy(pixels).to(device).permute(0, 4, 1, 2, 3).float() / 255


def score(clips: torch.Tensor, wanted: Sequence[Wanted], sprites: Sprites) -> dict[str, Any]:
    """Number of clips, percent of right things, motions and backgrounds, and the wrong ones; clips in [0, 1]."""
    things: list[bool] = []
    motions: list[bool] = []
    wrong: list[str] = []
    by_motion: dict[str, list[bool]] = {}
    for crossing in (False, True):
        rows = [i for i, clip in enumerate(wanted) if (clip.motion == CROSSING) == crossing]
        if not rows:
            continue
        part = clips[rows]
        found: list[Any]
        if crossing:
            found, moves = judge.judge_crossings(part, sprites)
        else:
            found, moves = judge.judge_singles(part, sprites)
        for i, thing, motion in zip(rows, found, moves, strict=True):
            shown: Any = thing if crossing else (thing, thing)
            right_thing, right_motion = shown == wanted[i].things, motion == wanted[i].motion
            things.append(right_thing)
            motions.append(right_motion)
            by_motion.setdefault(wanted[i].motion, []).append(right_motion)
            if not (right_thing and right_motion):
                wrong.append(f"{wanted[i].prompt} -> {', '.join(THINGS[k] for k in dict.fromkeys(shown))} {motion}")
    backgrounds = nearest_background(judge.clip_shade(clips))
    return {
        "clips": len(wanted),
        "thing": share(things),
        "motion": share(motions),
        "background": share([name == clip.background for name, clip in zip(backgrounds, wanted, strict=True)]),
        "motions": {name: share(hits) for name, hits in by_motion.items()},
        "wrong": wrong,
    }


def true_clips(sprites: Sprites, seed: int, count: int) -> tuple[torch.Tensor, list[Wanted]]:
    """Clips as in the training, in [-1, 1], and what they show."""
    plan = plan_clips(seed, 0, count)
    motions, backgrounds = list(MOTIONS), list(BACKGROUNDS)
    wanted = []
    rows = zip(plan.things.tolist(), plan.motions.tolist(), plan.backgrounds.tolist(), strict=True)
    for (first, second), motion, background in rows:
        name = motions[motion]
        wanted.append(Wanted((first, second if name == CROSSING else first), name, backgrounds[background]))
    return on_device(plan, sprites), wanted


class VideoEvaluation:
    """Scores of one saved model."""

    def __init__(self, pipeline: Any, sprites: Sprites, device: torch.device, prompts: int) -> None:
        self.pipeline, self.sprites, self.device, self.prompts = pipeline, sprites, device, prompts

    def prompted(self, seed: int, **settings: Any) -> dict[str, Any]:
        """Score of random prompts."""
        wanted = wanted_clips(seed, self.prompts)
        pixels = generate(self.pipeline, [clip.prompt for clip in wanted], seed, **settings)
        return score(as_clips(pixels, self.device), wanted, self.sprites)

    @torch.no_grad()
    def ceilings(self, seed: int) -> dict[str, Any]:
        """Scores of true clips and of their reconstructions: the upper limits for the model."""
        clips, wanted = true_clips(self.sprites, seed, self.prompts)
        true = score(clips / 2 + 0.5, wanted, self.sprites)
        latents = self.pipeline.vae.encode(clips).latent_dist.mode()
        shown = self.pipeline.vae.decode(latents).sample
        psnr = -10 * torch.log10(((shown - clips) / 2).square().mean((1, 2, 3, 4))).mean()
        reconstructed = score(shown / 2 + 0.5, wanted, self.sprites)
        return {"true clips": true, "reconstructions": reconstructed | {"psnr": round(float(psnr), 1)}}

    def variety(self, seeds: int = 8) -> float:
        """Deviation of the mean place between seeds for one prompt, as a part of the width, averaged over prompts."""
        spreads = []
        for thing in range(0, len(THINGS), len(THINGS) // 4):
            texts = [f"{with_article(thing)} standing still on a blue background"] * seeds
            clips = as_clips(generate(self.pipeline, texts, 1000), self.device)
            spreads.append(judge.lane_places(clips).mean(1).std().item())
        return round(float(np.mean(spreads)), 3)


def measure(evaluation: VideoEvaluation) -> dict[str, Any]:
    """Numbers of the model card."""
    started = time.monotonic()
    numbers: dict[str, Any] = {"prompts": evaluation.prompts, "frames": FRAMES}
    numbers |= evaluation.ceilings(seed=7)
    numbers["labels"] = evaluation.prompted(seed=20, steps=STEPS, guidance=GUIDANCE)
    print(json.dumps(numbers), flush=True)
    numbers["steps"] = {}
    for steps in (8, 12, 50):
        numbers["steps"][str(steps)] = evaluation.prompted(seed=30, steps=steps)
    numbers["guidance"] = {str(g): evaluation.prompted(seed=30, guidance=g) for g in (1.0, 2.0, 5.0)}
    numbers["variety"] = evaluation.variety()
    numbers["seconds"] = round(time.monotonic() - started)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("src/vllm_omni/demo_video"))
    parser.add_argument("--drawings", type=Path, default=Path(".demo-data/drawings.npz"))
    parser.add_argument("--out", type=Path, default=Path(".demo-data/video-evaluation"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    sprites = Sprites.from_rgba(drawings.load(args.drawings), device)
    pipeline = load_pipeline(args.model, device)
    args.out.mkdir(parents=True, exist_ok=True)
    clips = generate(pipeline, SAMPLES, seed=0)
    contact_sheet(clips, SAMPLES).save(args.out / "demo_video.png")
    save_preview(clips, args.out / "demo_video.webp")
    numbers = measure(VideoEvaluation(pipeline, sprites, device, args.prompts))
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    reached = all(numbers["labels"][name] >= GOAL for name in ("thing", "motion"))
    print(json.dumps({"labels": numbers["labels"], "reached": reached, "seconds": numbers["seconds"]}), flush=True)


if __name__ == "__main__":
    main()
