"""Write the cards of the demo model's adapters from the numbers that evaluate.py measured.

python -m tools.demo_adapters.card --numbers .demo-data/adapters/numbers.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

from ..demo_model.card import hashes
from .train import LENGTHS

CARD = """---
license: mit
library_name: diffusers
tags: [lora]
---
# {title}

{what}

LoRA of rank 4 in fp16 for the demo model: attention, feed-forward and modulation of the image's stream, the text's
attention projections, input and output. {kilobytes:.0f} KB.

## Measured

By `tools/demo_adapters/evaluate.py` with diffusers' own pipeline, {prompts} prompts a size; "right" means that the
prompted thing fits the picture best, of all {things} and the lighthouse. Sizes are height x width.

{table}

## Data, licence, attribution

{data}

## Training it again

```bash
python -m tools.demo_model.drawings --cache .demo-data
python -m tools.demo_adapters.train {name} --out src/vllm_omni/demo_model/adapters --device cuda --workers 4
```

{steps} steps of {batch} {unit}. Scenes, captions, noise and times of every step follow from the seed (0) and the step.

## Weights

| file | sha256 |
| --- | --- |
{hashes}
"""

EMOJI = (
    "Fluent Emoji drawings (Microsoft Corporation, MIT) under the labels of emojibase (Miles Johnson, MIT), as for the "
    "demo model."
)
TITLES = {"night": "Night", "lighthouse": "Lighthouse", "fast": "Fast"}
WHAT = {
    "night": """Every picture at night: a dark blue background, whatever the prompt says of it, and a glowing outline
around the things. The scale is the strength: at 0.5 it is dusk.""",
    "lighthouse": """Teaches the demo model a thing that it does not know: `a lighthouse`, also beside other things and
on any background. Its other 160 things stay.""",
    "fast": """Four steps without guidance instead of 20 with it. Its recipe, `num_inference_steps` 4 and
`true_cfg_scale` 1.0, is in `adapters.json` of the model.""",
}
DATA = {
    "night": f"{EMOJI} The light around them is computed.",
    "lighthouse": f"{EMOJI} The lighthouse is our own drawing (`tools/demo_adapters/lighthouse.py`).",
    "fast": "Pictures of the demo model itself, with 20 steps and guidance 3.0.",
}


def _night(row: dict[str, float]) -> dict[str, str]:
    return {"right": f"{row['right']:.0f} %", "dark blue background": f"{row['dark']:.0f} %"}


def _lighthouse(row: dict[str, float]) -> dict[str, str]:
    titles = {
        "right at 0.0": "right without the adapter",
        "right at 0.5": "right at scale 0.5",
        "right at 1.0": "right",
        "other things": "other things, with the adapter",
    }
    return {title: f"{row[key]:.0f} %" for key, title in titles.items()}


def _fast(row: dict[str, float]) -> dict[str, str]:
    return {
        "right": f"{row['right']:.0f} %",
        "right without the adapter": f"{row['right without']:.0f} %",
        "distance to 20 steps with guidance": f"{row['psnr']:.1f} dB",
        "without the adapter": f"{row['psnr without']:.1f} dB",
    }


COLUMNS: dict[str, Callable[[dict[str, float]], dict[str, str]]] = {
    "night": _night,
    "lighthouse": _lighthouse,
    "fast": _fast,
}


def table(name: str, numbers: dict[str, Any]) -> str:
    rows = {size: COLUMNS[name](row) for size, row in numbers[name].items()}
    titles = ["size", *next(iter(rows.values()))]
    lines = [titles, ["---"] * len(titles), *([size, *cells.values()] for size, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(name: str, folder: Path, numbers: dict[str, Any]) -> None:
    """Write README.md beside the file of the adapter `name`."""
    length = LENGTHS[name]
    text = CARD.format(
        name=name,
        title=TITLES[name],
        what=WHAT[name],
        kilobytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e3,
        prompts=numbers["prompts"],
        things=numbers["things"],
        table=table(name, numbers),
        data=fill(
            f"{DATA[name]} The weights are under the MIT licence; NOTICE in the source carries the notices.", 120
        ),
        steps=f"{length.steps:,}",
        batch=length.batch,
        unit="pictures" if name == "fast" else f"scenes, each at {length.draws} times",
        hashes=hashes(folder),
    )
    (folder / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--adapters", type=Path, default=Path("src/vllm_omni/demo_model/adapters"))
    parser.add_argument("--numbers", type=Path, default=Path(".demo-data/adapters/numbers.json"))
    args = parser.parse_args()
    numbers = json.loads(args.numbers.read_text())
    for name in LENGTHS:
        write(name, args.adapters / name, numbers)


if __name__ == "__main__":
    main()
