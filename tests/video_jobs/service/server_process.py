"""A process that runs the jobs of a store with the embedded video model, without HTTP.

`python -m tests.video_jobs.service.server_process FOLDER [NUM_STEPS]`: with NUM_STEPS it makes one job first and prints
its id. It runs until its standard input ends; then it drains.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from testbed.patience import GUARD_SECONDS
from tests.video_jobs.service.servers import OWNER, store_settings
from vllm_omni import AsyncOmni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.video_jobs.job_requests import NewVideo
from vllm_omni.video_jobs.service import VideoJobs

MODEL = "demo-video"
NUM_FRAMES = 5
LEASE_SECONDS = 5.0
"""Less than a start takes, so the second server need not wait; long enough for a loop that shares a busy machine."""


async def main(folder: str, num_steps: int | None) -> None:
    omni = AsyncOmni(MODEL, device="cpu", distributed_executor_backend="uni", progress_bar=False)
    settings = store_settings(Path(folder), lease_seconds=LEASE_SECONDS, checkpoint_seconds=0.05)
    videos = VideoJobs(omni, settings, MODEL)
    await videos.start()
    async with omni:
        if num_steps is not None:
            prompt = OmniPrompt("a red ball")
            params = OmniDiffusionSamplingParams(seed=3, num_frames=NUM_FRAMES, num_inference_steps=num_steps)
            checked = omni.check(prompt, params)
            job = await videos.create(NewVideo(OWNER, MODEL, prompt, checked))
            print(f"job {job.id}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await videos.drain(GUARD_SECONDS)
        await videos.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))
