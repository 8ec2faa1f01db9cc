"""Thumbnail and spritesheet of a video."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_omni.video_jobs.stills import Stills, grid, tile_frames


def written(frames: np.ndarray, folder: Path) -> tuple[Image.Image, Image.Image]:
    stills = Stills(len(frames))
    for number, frame in enumerate(frames):
        stills.add(number, frame)
    stills.write(folder / "thumbnail.webp", folder / "spritesheet.jpg")
    thumbnail, sheet = (folder / name for name in ("thumbnail.webp", "spritesheet.jpg"))
    return Image.open(io.BytesIO(thumbnail.read_bytes())), Image.open(io.BytesIO(sheet.read_bytes()))


def grey_levels(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames of one grey each, from black to white."""
    levels = np.linspace(0, 255, num_frames).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


GRIDS = {1: (1, 1), 2: (2, 1), 3: (2, 1), 4: (2, 2), 5: (2, 2), 6: (3, 2), 9: (3, 3), 12: (4, 3), 17: (4, 4)}
GRIDS |= {20: (5, 4), 24: (5, 4), 25: (5, 5), 81: (5, 5), 10_000: (5, 5)}


@pytest.mark.parametrize("num_frames", GRIDS)
def test_the_grid_is_filled(num_frames: int) -> None:
    assert grid(num_frames) == GRIDS[num_frames]


@pytest.mark.parametrize("num_frames", [*range(1, 40), 81, 121, 1000])
def test_the_tiles_are_spread_evenly_from_the_first_to_the_last_frame(num_frames: int) -> None:
    frames = tile_frames(num_frames)
    assert len(frames) == len(set(frames))
    assert frames[0] == 0
    if num_frames > 1:
        assert frames[-1] == num_frames - 1
        gaps = np.diff(frames)
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("num_frames", [1, 2, 17, 81])
def test_the_frames_stand_row_by_row_and_the_middle_one_is_the_thumbnail(num_frames: int, tmp_path: Path) -> None:
    frames = grey_levels(num_frames, 32, 48)
    thumbnail, sheet = written(frames, tmp_path)
    assert (thumbnail.format, sheet.format) == ("WEBP", "JPEG")
    assert thumbnail.size == (48, 32)
    columns, rows = grid(num_frames)
    assert sheet.size == (48 * columns, 32 * rows)
    pixels = np.asarray(sheet).astype(int)
    centres = pixels[16::32, 24::48, 0].reshape(-1)
    assert np.abs(centres - frames[tile_frames(num_frames), 0, 0, 0]).max() <= 3
    middle = frames[num_frames // 2, 0, 0].astype(int)
    assert np.abs(np.asarray(thumbnail.convert("RGB")).astype(int) - middle).max() <= 3


@pytest.mark.parametrize(
    ("size", "thumbnail_size", "tile_size"),
    [
        ((1280, 720), (512, 288), (256, 144)),
        ((720, 1280), (288, 512), (144, 256)),
        ((512, 512), (512, 512), (256, 256)),
        ((300, 20), (300, 20), (256, 17)),
        ((4000, 2), (512, 1), (256, 1)),
        ((1, 1), (1, 1), (1, 1)),
    ],
)
def test_large_frames_are_shrunk_and_none_is_enlarged(
    size: tuple[int, int], thumbnail_size: tuple[int, int], tile_size: tuple[int, int], tmp_path: Path
) -> None:
    thumbnail, sheet = written(grey_levels(1, size[1], size[0]), tmp_path)
    assert (thumbnail.size, sheet.size) == (thumbnail_size, tile_size)
