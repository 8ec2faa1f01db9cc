"""Video files: MP4 with H.264, which browsers and players show."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from vllm_omni.inputs.field_values import shown
from vllm_omni.video_writer import MAX_FPS, MAX_SIDE, MIN_FPS, OUTPUT_FORMATS, VideoFileWriter

_TAKES = "frames take uint8 arrays [frames, height, width, 3] (NumPy or torch), or a list of PIL images or of arrays"


def write_video(frames: Any, path: str | os.PathLike[str], fps: float) -> None:
    """Write an MP4 file: H.264, yuv420p, with its index in front, so that it plays while it is loaded.

    frames: one video, such as `output.images[0]`: an array or tensor uint8 [frames, height, width, 3], or several PIL
    images, arrays or tensors [height, width, 3], all of one size. A side with an odd number of pixels gets one more, a
    copy of its edge. fps: frames a second, from 0.01 to 1000. A file that exists is replaced once the new one is
    whole; it stays as it was if an error comes before.
    Raises ValueError for other frames and rates, and OSError for a path that is no file or cannot be written.
    """
    rate = frame_rate(fps)
    pictures = _pictures(frames)
    path = os.path.realpath(os.fsdecode(path))  # a link stays a link
    exists = os.path.exists(path)
    if exists:
        _check_file(path)
    part = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.part")
    with open(part, "xb"):  # an error that names the folder; FFmpeg's does not
        pass
    try:
        height, width, _ = pictures[0].shape
        with VideoFileWriter(part, OUTPUT_FORMATS["mp4"], rate, height, width) as writer:
            for picture in pictures:
                writer.write(picture)
        if exists:
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)  # no part of a file stays
        raise


def frame_rate(fps: Any, largest: int = MAX_FPS) -> Fraction:
    """Frames a second as a fraction that video files can hold. Raises ValueError."""
    if not isinstance(fps, Real) or isinstance(fps, bool) or not MIN_FPS <= float(fps) <= largest:
        raise ValueError(f"fps takes a number from {MIN_FPS} to {largest}, got {shown(fps)}")
    return Fraction(float(fps)).limit_denominator(1001)


def _check_file(path: str) -> None:
    """Raise OSError for a folder, a device, and a file that may not be written."""
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(f"a video is written to a file, got {path}, which is something else")
    with open(path, "r+b"):
        pass


def _pictures(frames: Any) -> list[np.ndarray]:
    """Frames as uint8 [height, width, 3] of one size. Raises ValueError."""
    if isinstance(frames, str | bytes | Image.Image) or not isinstance(frames, Iterable):
        raise ValueError(f"{_TAKES}, got {type(frames).__name__}")
    if getattr(frames, "ndim", 4) != 4:
        raise ValueError(f"{_TAKES}, got the shape {list(frames.shape)}")  # type: ignore[attr-defined]
    pictures = [_picture(frame, number) for number, frame in enumerate(frames)]
    if not pictures:
        raise ValueError(f"{_TAKES}, got no frame")
    height, width, _ = pictures[0].shape
    for number, picture in enumerate(pictures):
        if picture.shape != pictures[0].shape:
            raise ValueError(
                f"frames have one size, got {width}x{height} and, as frame {number}, "
                f"{picture.shape[1]}x{picture.shape[0]}"
            )
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise ValueError(f"frames have sides of 1 to {MAX_SIDE} pixels, got {width}x{height}")
    return pictures


def _picture(frame: Any, number: int) -> np.ndarray:
    """One frame as uint8 [height, width, 3]. Raises ValueError."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    if hasattr(frame, "detach"):  # a tensor, recognized by its methods: this module does not import PyTorch
        frame = frame.detach().cpu()
    if getattr(frame, "ndim", None) != 3 or frame.shape[2] != 3 or str(frame.dtype).rpartition(".")[2] != "uint8":
        got = f"{frame.dtype} {list(frame.shape)}" if hasattr(frame, "dtype") else type(frame).__name__
        raise ValueError(f"{_TAKES}, got {got} as frame {number}")
    return np.asarray(frame)
