"""Loss of quality by float8: pictures with `--quantization fp8` and in bfloat16, against float32.

    python -m benchmarks.fp8_quality --prompts 100

On the demo model, 20 steps with guidance, all prompts in one call. PSNR is to the float32 picture of the same seed.
A picture is "right" if a search over all of the demo model's drawings finds the thing in its prompt.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools.demo_model import judge
from tools.demo_model.scenes import Sprites
from tools.demo_model.vocabulary import THINGS

from benchmarks.cache_quality import demo_prompts, psnr
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8 beside bfloat16": {"dtype": "bfloat16", "quantization": "fp8"},
}
DRAWINGS = Path("tests/demo_model/thumbnails.npz")


def draw(prompts: Sequence[str], steps: int, settings: Mapping[str, Any]) -> np.ndarray:
    """Draw all prompts in one call; uint8 [pictures, height, width, 3]."""
    params = [
        OmniDiffusionSamplingParams(num_inference_steps=steps, true_cfg_scale=3.0, seed=seed, output_type="np")
        for seed in range(len(prompts))
    ]
    with Omni(model="demo", distributed_executor_backend="uni", **settings) as omni:
        outputs = omni.generate([OmniPrompt(prompt, negative_prompt="") for prompt in prompts], params)
    return np.stack([output.images[0] for output in outputs])


def right(pictures: np.ndarray, sprites: Sprites) -> int:
    """Number of pictures that show the thing in their prompt, as `demo_prompts` chose it."""
    found = judge.best_fit(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, sprites, pair=False).things.tolist()
    return sum(found[i] == i * len(THINGS) // len(found) % len(THINGS) for i in range(len(found)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="how many")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    prompts = demo_prompts(args.prompts)
    with np.load(DRAWINGS) as file:
        sprites = Sprites.from_rgba(file["rgba"], torch.device("cpu"))
    pictures = {name: draw(prompts, args.steps, settings) for name, settings in SETTINGS.items()}
    print(f"| {len(prompts)} prompts, {args.steps} steps | PSNR mean / median / min | right |\n|---|---|---|")
    for name, drawn in pictures.items():
        decibels = [psnr(a, b) for a, b in zip(drawn, pictures["float32"], strict=True)]
        values = statistics.mean(decibels), statistics.median(decibels), min(decibels)
        compared = " / ".join(f"{value:.1f}" for value in values) + " dB" if name != "float32" else ""
        print(f"| {name} | {compared} | {right(drawn, sprites)} |")


if __name__ == "__main__":
    main()
