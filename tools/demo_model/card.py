"""Write the model card from the numbers that evaluate.py measured.

python -m tools.demo_model.card --model src/vllm_omni/demo_model --numbers .demo-data/evaluation/numbers.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .vocabulary import BACKGROUNDS, OTHER_NAMES, THINGS

CARD = """---
license: mit
pipeline_tag: text-to-image
library_name: diffusers
---
# The demo model

A small text-to-image model in Qwen-Image's own architecture: `AutoencoderKLQwenImage`,
`Qwen2_5_VLForConditionalGeneration` with a tokenizer of 1,400 tokens, `QwenImageTransformer2DModel` (5 layers, 4 heads
of 48) and Qwen-Image's scheduler. {size:.1f} MB in bf16. It draws {things} things on {backgrounds} backgrounds and is
there for demonstrations, examples and tests: a wrong picture is seen at once. It is of no other use.

Native size 64x64, 20 steps, guidance (`true_cfg_scale`) {guidance}: `default_sampling_params.json`. Prompts it knows:

- `red apple`, `a red apple`, `a panda on a pink background`
{pair_prompts}
`docs/demo_model.png` in the source shows pictures of it.

## What it does well and badly

Measured by `tools/demo_model/evaluate.py` with diffusers' own pipeline: {prompts} prompts a size, each a plain label;
"right" means that of all {things} drawings the prompted one fits the picture best over places, scales and tilts.
{pairs_measured}Sizes are height x width. Of true scenes the judge names {true}.

{table}

- Backgrounds ("a THING on a COLOUR background", {prompts} prompts each): {backgrounds_right}.
- By the number of steps, {native}: {steps}. Without guidance: {plain} %.
- The autoencoder's reconstructions: {psnr} dB PSNR.
- Seeds differ in place (deviation {x:.0%} of the width, {y:.0%} of the height), scale ({scale:.0%}) and shade.
{weak}
## Vocabulary

Backgrounds: {colours}; without one, white. Things, with other names in brackets: {vocabulary}.

## Data, licence, attribution

Fluent Emoji drawings (Microsoft Corporation, MIT, npm `@iconify-json/fluent-emoji-flat` 1.2.6) under the labels of
emojibase (Miles Johnson, MIT, npm `emojibase-data` 17.0.0). Scenes are composed of them at random. The weights are
under the MIT licence too; NOTICE in the source carries both notices.

## Training it again

{training}

## Weights

| file | sha256 |
| --- | --- |
{hashes}
"""


def vocabulary(other_names: Mapping[str, str]) -> str:
    return ", ".join(f"{label} ({other_names[label]})" if label in other_names else label for label in THINGS)


PAIR_PROMPTS = (
    "- `a red apple left of a blue heart`, also `right of`, `above`, `below`, also `... on a blue background`\n"
)
PAIRS_MEASURED = (
    "Of two things ({} prompts a size and direction) each has to fit best in its own half of the picture.\n"
)


def table(numbers: dict[str, Any]) -> str:
    if not numbers["pairs"]:
        rows = [f"| {size} | {labels['right']:.0f} % |" for size, labels in numbers["labels"].items()]
        return "\n".join(["| size | right |", "| --- | --- |", *rows])
    lines = ["| size | right | two things, side by side: both, each | one above the other: both, each |"]
    lines.append("| --- | --- | --- | --- |")
    for size, labels in numbers["labels"].items():
        beside, stacked = (numbers["pairs"][size][name] for name in ("left/right", "above/below"))
        cells = [f"{pair['both']:.0f} %, {pair['each']:.0f} %" for pair in (beside, stacked)]
        lines.append(f"| {size} | {labels['right']:.0f} % | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def files_of(model: Path) -> list[Path]:
    """Files of a saved model without its adapters, which have cards of their own."""
    files = sorted(file for file in model.rglob("*") if file.is_file())
    return [file for file in files if not file.is_relative_to(model / "adapters")]


def hashes(model: Path) -> str:
    rows = []
    for file in [file for file in files_of(model) if file.suffix == ".safetensors"]:
        rows.append(f"| {file.relative_to(model)} | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |")
    return "\n".join(rows)


def listed(values: dict[str, float], word: str) -> str:
    return ", ".join(f"{key}{word} {value:.0f} %" for key, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("src/vllm_omni/demo_model"))
    parser.add_argument("--numbers", type=Path, default=Path(".demo-data/evaluation/numbers.json"))
    parser.add_argument("--training", type=Path, required=True, help="a text on how these weights were made")
    parser.add_argument("--weak", type=Path, required=True, help="a text on what is weak")
    parser.add_argument("--psnr", type=float, required=True, help="of the autoencoder, from the training log")
    args = parser.parse_args()
    numbers = json.loads(args.numbers.read_text())
    defaults = json.loads((args.model / "default_sampling_params.json").read_text())
    size = sum(file.stat().st_size for file in files_of(args.model) if file.suffix != ".md")
    text = CARD.format(
        size=size / 1e6,
        things=len(THINGS),
        backgrounds=len(BACKGROUNDS),
        guidance=defaults["true_cfg_scale"],
        prompts=numbers["prompts"],
        pair_prompts=PAIR_PROMPTS if numbers["pairs"] else "",
        pairs_measured=PAIRS_MEASURED.format(numbers["prompts"] // 2) if numbers["pairs"] else "",
        native=numbers["native"],
        true=listed(numbers["true scenes"], " scenes").replace("background scenes", "backgrounds"),
        table=table(numbers),
        backgrounds_right=listed({k: v["background"] for k, v in numbers["backgrounds"].items()}, ""),
        steps=listed(numbers["steps"], " steps"),
        plain=round(numbers["without guidance"]),
        psnr=args.psnr,
        **{name: numbers["variety"][name] for name in ("x", "y", "scale")},
        weak=args.weak.read_text(),
        colours=", ".join(BACKGROUNDS),
        vocabulary=vocabulary(OTHER_NAMES),
        training=args.training.read_text().strip(),
        hashes=hashes(args.model),
    )
    (args.model / "README.md").write_text(text)


if __name__ == "__main__":
    main()
