"""Write the video model's card from the numbers that evaluate.py measured.

python -m tools.demo_video.card --model src/vllm_omni/demo_video --numbers .demo-data/video-evaluation/numbers.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..demo_model.card import hashes, listed, vocabulary
from ..demo_model.vocabulary import BACKGROUNDS, THINGS
from .motions import FRAMES, FRAMES_PER_SECOND, MOTIONS, OTHER_NAMES_HERE, SIDE

CARD = """---
license: mit
pipeline_tag: text-to-video
library_name: diffusers
---
# The demo video model

A small text-to-video model in Wan's own architecture: `AutoencoderKLWan`, `UMT5EncoderModel` with a tokenizer of
{words} words, `WanTransformer3DModel` ({layers} layers, {heads} heads of {head}) and `UniPCMultistepScheduler`.
{size:.1f} MB in bf16. It shows {things} things in {motions} motions on {backgrounds} backgrounds and is there for
demonstrations, examples and tests: a wrong video is seen at once. It is of no other use.

Native size {side}x{side}, {frames} frames at {fps} frames per second, {steps} steps, `guidance_scale` {guidance}:
`default_sampling_params.json`. Prompts it knows:

- `a red apple moving right`, `a panda jumping`, `a blue heart growing on a yellow background`
- `two stars crossing`, `a cat and a dog crossing`: the first moves right in the upper half, the other left in the lower

`docs/demo_video.png` and `docs/demo_video.webp` in the source show videos of it.

## What it does well and badly

Measured by `tools/demo_video/evaluate.py` with diffusers' own pipeline: {prompts} prompts, all motions equally often.
"Right thing" means that of all {things} drawings the prompted one fits the first, middle and last frame best; "right
motion" that the thing's track, measured in the pixels of every frame, is the prompted motion's.

| what | clips | right thing | right motion | right background |
| --- | --- | --- | --- | --- |
{rows}

- By motion: {by_motion}.
- The autoencoder's reconstructions: {psnr} dB PSNR.
{seeds}{weak}
## Vocabulary

Motions, with other words for them in brackets: {motion_words}.
Backgrounds: {colours}; without one, white. Things, with other names in brackets: {vocabulary}.

## Data, licence, attribution

Fluent Emoji drawings (Microsoft Corporation, MIT, npm `@iconify-json/fluent-emoji-flat` 1.2.6) under the labels of
emojibase (Miles Johnson, MIT, npm `emojibase-data` 17.0.0). Clips are composed of them at random. The weights are under
the MIT licence too; NOTICE in the source carries both notices.

## Training it again

{training}

## Weights

| file | sha256 |
| --- | --- |
{hashes}
"""


def motion_words() -> str:
    parts = []
    for motion in MOTIONS.values():
        first, *others = motion.phrases
        parts.append(f"{first} ({', '.join(others)})" if others else first)
    return "; ".join(parts)


def row(name: str, scores: dict[str, Any]) -> str:
    percents = " | ".join(f"{scores[key]:.0f} %" for key in ("thing", "motion", "background"))
    return f"| {name} | {scores['clips']} | {percents} |"


def rows(numbers: dict[str, Any], steps: int, guidance: float) -> str:
    """Table of all measured scores."""
    lines = [row(name, numbers[name]) for name in ("true clips", "reconstructions")]
    lines.append(row(f"**prompts, {steps} steps, guidance {guidance}**", numbers["labels"]))
    lines += [row(f"{count} steps", scores) for count, scores in numbers["steps"].items()]
    lines += [row(f"guidance {scale}", scores) for scale, scores in numbers["guidance"].items()]
    return "\n".join(lines)


def seeds(variety: float | None) -> str:
    """Line on the difference between seeds; empty where it was not measured."""
    if variety is None:
        return ""
    return f"- Seeds differ in place (deviation {variety:.0%} of the width), size and shade.\n"


def card(model: Path, numbers: dict[str, Any], training: str, weak: str) -> str:
    """Text of the card."""
    defaults = json.loads((model / "default_sampling_params.json").read_text())
    transformer = json.loads((model / "transformer/config.json").read_text())
    encoder = json.loads((model / "text_encoder/config.json").read_text())
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file() and file.suffix != ".md")
    steps, guidance = defaults["num_inference_steps"], defaults["guidance_scale"]
    return CARD.format(
        words=encoder["vocab_size"],
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head=transformer["attention_head_dim"],
        size=size / 1e6,
        things=len(THINGS),
        motions=len(MOTIONS),
        backgrounds=len(BACKGROUNDS),
        side=SIDE,
        frames=FRAMES,
        fps=FRAMES_PER_SECOND,
        steps=steps,
        guidance=guidance,
        prompts=numbers["prompts"],
        rows=rows(numbers, steps, guidance),
        by_motion=listed(numbers["labels"]["motions"], ""),
        psnr=numbers["reconstructions"]["psnr"],
        seeds=seeds(numbers.get("variety")),
        weak=weak,
        motion_words=motion_words(),
        colours=", ".join(BACKGROUNDS),
        vocabulary=vocabulary(OTHER_NAMES_HERE),
        training=training.strip(),
        hashes=hashes(model),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("src/vllm_omni/demo_video"))
    parser.add_argument("--numbers", type=Path, default=Path(".demo-data/video-evaluation/numbers.json"))
    parser.add_argument("--training", type=Path, required=True, help="a text on how these weights were made")
    parser.add_argument("--weak", type=Path, required=True, help="a text on what is weak")
    args = parser.parse_args()
    numbers = json.loads(args.numbers.read_text())
    text = card(args.model, numbers, args.training.read_text(), args.weak.read_text())
    (args.model / "README.md").write_text(text)


if __name__ == "__main__":
    main()
