"""Frames with two colours, and a reader of video files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

LEFT, RIGHT = (200, 30, 40), (20, 180, 90)


def two_colours(num_frames: int = 5, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose left part, in the first colour, grows by 8 pixels a frame."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = RIGHT
    for number in range(num_frames):
        frames[number, :, : 8 + 8 * number] = LEFT
    return frames


def read(path: Path) -> tuple[Any, list[np.ndarray]]:
    """The video stream, and its decoded frames as [height, width, 3]."""
    with av.open(str(path)) as container:
        (stream,) = container.streams
        return stream, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
