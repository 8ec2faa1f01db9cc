"""Make videos: run requests on the engine, and encode their frames while later ones are decoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import numpy as np

from vllm_omni.diffusion.messages.request import DiffusionRequest
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
        """Run a `job` of one video and encode it; the caller removes the files. A caller that is cancelled stops both.

        `on_output`: called with each output of the engine. Raises RequestError.
        """
        outputs, encoded = self._omni.submit(job), None
        try:
            async with aclosing(outputs), aclosing(self.encode(job, outputs, output_format, on_output)) as videos:
                async for _, files in videos:
                    encoded = files or encoded
        except BaseException:
            if encoded is not None:
                await asyncio.to_thread(encoded.remove)
            raise
        assert encoded is not None, "a request ends with its video or an error"
        return encoded

    async def encode(
        self,
        job: Job,
        outputs: OutputStream,
        output_format: str,
        on_output: Callable[[OmniRequestOutput], None] = lambda output: None,
    ) -> AsyncGenerator[tuple[OmniRequestOutput, EncodedVideo | None], None]:
        """Encode the videos of a submitted `job`, whose `outputs` these are, while later frames are decoded.

        Yields each output that completes a video, with its files, which the caller removes; last the result, with None.
        Closing it early cancels what is not encoded. `on_output`: see `make`. Raises RequestError.
        """
        feeds = [Feed(self._begin(scheduled.request, output_format)) for scheduled in job.requests]
        try:
            async for output in outputs:
                on_output(output)
                if output.finished:
                    yield output, None
                elif (encoded := await feeds[output.index].take(output)) is not None:
                    yield output, encoded
        finally:
            for feed in feeds:
                feed.cancel()

    def _begin(self, request: DiffusionRequest, output_format: str) -> VideoEncoding:
        fps = request.fps or DEFAULT_FPS
        return self._encoders.begin(output_format, request.num_frames, request.height, request.width, fps, self._folder)


class Feed:
    """Hands the frames of one video to its encoder as they come."""

    def __init__(self, encoding: VideoEncoding) -> None:
        self._encoding = encoding
        self._num_frames = 0
        self._is_finished = False

    async def take(self, output: OmniRequestOutput) -> EncodedVideo | None:
        """Take the frames of an output of this video; return the files once the video is whole."""
        if output.frames is not None:
            self._encoding.add(output.frames)
            self._num_frames += len(output.frames)
        if not is_whole_output(output):
            return None
        video = np.asarray(output.images[0])
        rest = (video if video.ndim == 4 else video[None])[self._num_frames :]
        if len(rest):  # frames of a whole pipeline come all at once; a video of one frame is a picture
            self._encoding.add(rest)
        encoded = await self._encoding.finish()
        self._is_finished = True
        return encoded

    def cancel(self) -> None:
        if not self._is_finished:
            self._encoding.cancel()


def is_whole_output(output: OmniRequestOutput) -> bool:
    """Whether a progress message brings a whole video, or picture, and not a preview."""
    return bool(output.images) and output.step == output.num_inference_steps
