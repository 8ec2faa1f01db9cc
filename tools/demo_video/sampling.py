"""Clips from a saved pipeline, contact sheets of them, and an animated preview."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .motions import FRAMES, FRAMES_PER_SECOND, SIDE
from .network import CAPTION_TOKENS, GUIDANCE, STEPS

SAMPLES = [
    *("a red apple moving right", "a panda jumping", "a blue heart growing on a yellow background"),
    *("two stars crossing on a blue background", "a rocket moving up on a black background"),
    *("a ball bouncing on a green background", "a ghost fading in on a purple background"),
    *("a pizza spinning on an orange background", "a sailboat moving left on a blue background"),
    *("a strawberry shrinking on a pink background", "a bell swinging", "a cat and a dog crossing"),
]


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seed: int,
    *,
    frames: int = FRAMES,
    side: int = SIDE,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 50,
) -> np.ndarray:
    """One clip per prompt, uint8 [n, frames, side, side, 3]; clip i depends only on its prompt and on seed + i."""
    clips = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        made = pipeline(
            part,
            negative_prompt=[""] * len(part),
            guidance_scale=guidance,
            height=side,
            width=side,
            num_frames=frames,
            num_inference_steps=steps,
            max_sequence_length=CAPTION_TOKENS,
            generator=generators,
            output_type="np",
        ).frames
        clips.append((made * 255).round().astype(np.uint8))
    return np.concatenate(clips)


def as_pixels(clips: torch.Tensor) -> np.ndarray:
    """Clips [n, 3, frames, height, width] in [-1, 1] as uint8 [n, frames, height, width, 3]."""
    pixels: np.ndarray = ((clips.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
    return pixels


def contact_sheet(clips: np.ndarray, captions: Sequence[str], every: int = 2) -> Image.Image:
    """Sheet with one clip a row: its caption, and every second frame."""
    shown = clips[:, ::every]
    count, frames, height, width, _ = shown.shape
    caption = 150
    sheet = Image.new("RGB", (caption + frames * (width + 2), count * (height + 2)), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for row, (clip, text) in enumerate(zip(shown, captions, strict=True)):
        top = row * (height + 2)
        pen.text((4, top + 4), _in_lines(text, 24), fill="black", spacing=2)
        for column, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame), (caption + column * (width + 2), top))
    return sheet


def _in_lines(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def save_preview(clips: np.ndarray, path: Path, columns: int = 4, scale: int = 2) -> None:
    """Write all clips side by side, enlarged, as an endless animation: WebP or GIF, by the path's suffix."""
    count, frames, height, width, _ = clips.shape
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, frames, height, width, 3), np.uint8)
    padded[:count] = clips
    walls = padded.reshape(rows, columns, frames, height, width, 3).transpose(2, 0, 3, 1, 4, 5)
    walls = walls.reshape(frames, rows * height, columns * width, 3)
    size = (columns * width * scale, rows * height * scale)
    pictures = [Image.fromarray(wall).resize(size, Image.Resampling.LANCZOS) for wall in walls]
    # The last frame stays a little, so that the start over is seen.
    durations = [1000 // FRAMES_PER_SECOND] * (frames - 1) + [600]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=80)
