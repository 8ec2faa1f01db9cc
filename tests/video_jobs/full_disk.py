"""Script that encodes a small and a large video with a limit on the size of files; prints how each of them ended."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from pathlib import Path

import numpy as np

from tests.videos import read
from vllm_omni.errors import RequestError
from vllm_omni.video_jobs.encoding import VideoEncoderPool


async def outcome(pool: VideoEncoderPool, frames: np.ndarray, output_format: str, folder: Path) -> str:
    """Encode; return the error's message, or `whole` if all frames are in the file."""
    num_frames, height, width, _ = frames.shape
    encoding = pool.begin(output_format, num_frames, height, width, 8, folder)
    try:
        for frame in frames:
            encoding.add(frame[None])
            await asyncio.sleep(0)
        encoded = await encoding.finish()
    except RequestError as error:
        return f"{type(error).__name__}: {error}"
    whole = len(read(encoded.video)[1]) == num_frames
    encoded.remove()
    return "whole" if whole else "a part"


async def main(output_format: str, folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), np.uint8)
    flat = np.full((8, 16, 16, 3), 128, np.uint8)
    pool = VideoEncoderPool(2)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 3_000, 20_000, 52_500, 10_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        ends = await asyncio.gather(*(outcome(pool, frames, output_format, folder) for frames in (flat, noise)))
        # Standard output is a pipe, which has no such limit.
        print(limit, *ends, sep="|", flush=True)
    await pool.close()
    assert not os.listdir(folder)


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
