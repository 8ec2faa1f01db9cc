"""Still pictures of a video, taken while its frames pass: a thumbnail and a spritesheet."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

THUMBNAIL_SIDE = 512
"""Longest side of a thumbnail in pixels; a smaller frame keeps its size."""
TILE_SIDE = 256
"""Longest side of a spritesheet's tile in pixels."""
_QUALITY = 85
"""Quality of both files, 0 to 100."""
MAX_COLUMNS = 5
"""Most columns and most rows of a spritesheet."""


def grid(num_frames: int) -> tuple[int, int]:
    """Columns and rows of the spritesheet: the largest grid of at most 5x5 that `num_frames` frames fill.

    Rows are as many as columns, or one fewer: 1x1, 2x1, 2x2, 3x2, 3x3, 4x3, 4x4, 5x4 or 5x5.
    """
    columns = min(MAX_COLUMNS, math.isqrt(num_frames - 1) + 1)
    while True:
        for rows in (columns, columns - 1):
            if 0 < columns * rows <= num_frames:
                return columns, rows
        columns -= 1


def tile_frames(num_frames: int) -> list[int]:
    """Numbers of the frames on the spritesheet, row by row: evenly spread, with the first and the last frame."""
    columns, rows = grid(num_frames)
    num_tiles = columns * rows
    return [round(tile * (num_frames - 1) / max(num_tiles - 1, 1)) for tile in range(num_tiles)]


class Stills:
    """Thumbnail (the middle frame) and spritesheet of one video of `num_frames` frames.

    Keeps small pictures only. Methods block; they are called with every frame in order, then once at the end.
    """

    def __init__(self, num_frames: int) -> None:
        self._grid = grid(num_frames)
        self._tile_frames = set(tile_frames(num_frames))
        self._middle = num_frames // 2
        self._tiles: list[Image.Image] = []
        self._thumbnail: Image.Image | None = None

    def add(self, number: int, frame: np.ndarray) -> None:
        """Take frame `number`, uint8 [height, width, 3], if it is to be shown."""
        if number == self._middle:
            self._thumbnail = _fitted(frame, THUMBNAIL_SIDE)
        if number in self._tile_frames:
            self._tiles.append(_fitted(frame, TILE_SIDE))

    def write(self, thumbnail: Path, spritesheet: Path) -> None:
        """Write a WebP and a JPEG file. Raises OSError."""
        columns, rows = self._grid
        assert self._thumbnail is not None
        assert len(self._tiles) == columns * rows
        _write(self._thumbnail, thumbnail, "WEBP")
        width, height = self._tiles[0].size
        sheet = Image.new("RGB", (columns * width, rows * height))
        for number, tile in enumerate(self._tiles):
            sheet.paste(tile, (number % columns * width, number // columns * height))
        _write(sheet, spritesheet, "JPEG")


def _fitted(frame: np.ndarray, side: int) -> Image.Image:
    """Copy of a frame, whose longer side is at most `side` pixels."""
    height, width, _ = frame.shape
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _write(image: Image.Image, path: Path, kind: str) -> None:
    file = io.BytesIO()  # Pillow's own error for a full disk has no reason
    image.save(file, kind, quality=_QUALITY)
    path.write_bytes(file.getvalue())
