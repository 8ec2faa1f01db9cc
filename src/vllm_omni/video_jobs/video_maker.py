"""Make one video: run its request on the engine, and encode its frames while later ones are decoded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import numpy as np

from vllm_omni.jobs import Job, OutputStream
from vllm_omni.omni import AsyncOmni
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.video_jobs.encoding import EncodedVideo, VideoEncoderPool, VideoEncoding
from vllm_omni.video_jobs.job_requests import DEFAULT_FPS


class VideoMaker:
    """Makes videos with one engine and one pool of encoders."""

    def __init__(self, omni: AsyncOmni, encoders: VideoEncoderPool, folder: Path) -> None:
        """`folder`: place for files that are being written."""
        self._omni = omni
        self._encoders = encoders
        self._folder = folder

    async def make(
        self, job: Job, output_format: str, on_output: Callable[[OmniRequestOutput], None] = lambda output: None
    ) -> EncodedVideo:
        """Run `job` and encode its video; the caller removes the files. A caller that is cancelled stops both.

        `on_output`: called with each output of the engine. Raises RequestError.
        """
        request = job.requests[0].request
        stream = self._omni.submit(job)
        async with aclosing(stream):
            encoding = self._encoders.begin(
                output_format,
                request.num_frames,
                request.height,
                request.width,
                request.fps or DEFAULT_FPS,
                self._folder,
            )
            try:
                await _feed(encoding, stream, on_output)
                return await encoding.finish()
            except BaseException:
                encoding.cancel()
                raise


async def _feed(encoding: VideoEncoding, stream: OutputStream, on_output: Callable[[OmniRequestOutput], None]) -> None:
    """Hand all frames of a stream to the encoder as they come."""
    num_frames = 0
    async for output in stream:
        on_output(output)
        if output.frames is not None:
            encoding.add(output.frames)
            num_frames += len(output.frames)
        if output.finished:
            video = np.asarray(output.images[0])
            rest = (video if video.ndim == 4 else video[None])[num_frames:]
            if len(rest):  # a video of one frame comes as a picture
                encoding.add(rest)
