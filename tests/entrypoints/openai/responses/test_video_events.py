"""Server-sent events of video jobs are encoded once for all listeners."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator

import numpy as np

from testbed.patience import until
from tests.video_jobs.store.stores import new_job
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.responses.videos import EventEncoder
from vllm_omni.video_jobs.views import VideoView
from vllm_omni.video_jobs.watching import PreviewImage, VideoEvent

SHOWN = {"size": "64x64", "seconds": "1", "num_frames": 9, "fps": 8, "seed": 3, "num_inference_steps": 4}


def preview() -> PreviewImage:
    job = new_job(shown=SHOWN, request={"prompt": "x", "output_format": "mp4"})
    return PreviewImage(VideoView(job, 1.0, 200), np.zeros((64, 64, 3), np.uint8))


async def stream(*events: VideoEvent) -> AsyncGenerator[VideoEvent, None]:
    for event in events:
        yield event


async def test_a_preview_is_encoded_once_although_a_listener_leaves() -> None:
    seconds: list[float] = []
    images = ImageEncoder(1, 1, seconds.append)
    encoder = EventEncoder(images)

    async def listen(event: VideoEvent) -> list[bytes]:
        return [data async for data in encoder.sent(stream(event))]

    event = preview()
    gone, *others = [asyncio.create_task(listen(event)) for _ in range(5)]
    await until(lambda: len(encoder._encoded) == 1)
    gone.cancel()
    sent = await asyncio.gather(*others)
    assert len({data for (data,) in sent}) == 1
    assert sent[0][0].startswith(b"event: video.preview\r\ndata: {")
    assert len(seconds) == 1
    del event, gone, others
    await until(lambda: gc.collect() is not None and not encoder._encoded)  # its bytes go with the event
    images.close()
