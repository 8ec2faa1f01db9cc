"""Pictures of kinds that encoders compress differently, drawn from a seed."""

from __future__ import annotations

import math
import string
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture = Callable[[int, int, np.random.Generator], np.ndarray]

GRAIN = 4.0
"""Standard deviation of a photograph's noise, in levels."""
OVERSAMPLING = 4
"""Factor by which drawings are larger before they are scaled down, for smooth edges."""
NUM_SHAPES, NUM_CORNERS = 60, (3, 8)
FONT_PIXELS, LINE_PIXELS, MARGIN = 14, 18, 8


def photograph(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Smooth noise of every scale, as in nature, and grain."""
    total = np.zeros((height, width, 3))
    cells = 2
    while cells <= max(height, width):
        noise = random.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., i]).resize((width, height), Image.Resampling.BICUBIC) for i in range(3)]
        total += np.stack([np.asarray(layer) for layer in layers], axis=-1) / cells**0.9
        cells *= 2
    levels = (total - total.mean()) / max(total.std(), 1e-6) * 50 + 128
    grainy: np.ndarray = levels + random.normal(0, GRAIN, total.shape)
    return grainy.clip(0, 255).astype(np.uint8)


def drawing(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Discs and polygons of one colour each, outlined, with smooth edges."""
    large = (width * OVERSAMPLING, height * OVERSAMPLING)
    image = Image.new("RGB", large, (250, 244, 230))
    draw = ImageDraw.Draw(image)
    outline = {"outline": (20, 20, 20), "width": 3 * OVERSAMPLING}
    for _ in range(NUM_SHAPES):
        x, y = int(random.integers(large[0])), int(random.integers(large[1]))
        radius = math.ceil(max(large) * random.uniform(1 / 40, 1 / 6))
        red, green, blue = (int(value) for value in random.integers(0, 256, 3))
        if random.random() < 0.5:
            draw.circle((x, y), radius, (red, green, blue), **outline)
        else:
            draw.regular_polygon((x, y, radius), int(random.integers(*NUM_CORNERS)), 0, (red, green, blue), **outline)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def text(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A page of words in black on white, in Pillow's own font."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_PIXELS)
    letters = np.array(list(string.ascii_lowercase))
    for y in range(MARGIN, height - LINE_PIXELS, LINE_PIXELS):
        words = ("".join(random.choice(letters, size)) for size in random.integers(2, 10, width // FONT_PIXELS))
        draw.text((MARGIN, y), " ".join(words), "black", font)
    return np.asarray(image)


def gradient(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack((x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height)), axis=-1).astype(np.uint8)


def noise(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES: dict[str, Picture] = {
    "photograph": photograph,
    "drawing": drawing,
    "text": text,
    "gradient": gradient,
    "noise": noise,
}


def picture(kind: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Picture of a kind, uint8 [height, width, 3]."""
    return PICTURES[kind](height, width, np.random.default_rng(seed))
