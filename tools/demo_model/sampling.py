"""Pictures from a saved pipeline, and grids of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

SAMPLES = [
    *("red apple", "a cool face", "a panda on a pink background", "pizza on a purple background"),
    *("a rocket", "a sunflower on a blue background", "a hamburger on a black background", "a guitar"),
    *(
        "a red apple left of a blue heart",
        "a cat above a soccer ball",
        "a frog right of a taxi on a pink background",
    ),
    *("a rocket below a full moon on a black background", "strawberry above banana", "an owl left of a tree"),
    *("a robot right of a gift on a yellow background", "a penguin below an umbrella on a green background"),
]


def load_pipeline(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    seed: int,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 100,
) -> list[np.ndarray]:
    """One picture per prompt, uint8 [height, width, 3]; picture i depends only on seed + i."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        made = pipeline(
            part,
            negative_prompt=[""] * len(part) if guidance > 1 else None,
            true_cfg_scale=guidance,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
        ).images
        pictures += list((made * 255).round().astype(np.uint8))
    return pictures


def grid(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int, cell: int = 150) -> Image.Image:
    """Grid of pictures, each with its caption in two lines below."""
    side = max(max(picture.shape[:2]) for picture in pictures)
    rows = -(-len(pictures) // columns)
    width, height = max(cell, side + 10), side + 36
    sheet = Image.new("RGB", (columns * width, rows * height), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for k, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        x, y = (k % columns) * width, (k // columns) * height
        sheet.paste(Image.fromarray(picture), (x + (width - picture.shape[1]) // 2, y + 4))
        cut = text.rfind(" ", 0, 25) if len(text) > 24 else len(text)
        pen.text((x + 3, y + side + 6), text[:cut] + "\n" + text[cut + 1 :], fill="black", spacing=1)
    return sheet
