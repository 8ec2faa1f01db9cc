"""Servers of video jobs without HTTP: real services and engines, whose devices are fakes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from testbed.fakes import FakeExecutor, FakeRunner, make_ready
from testbed.patience import GUARD_SECONDS
from tests.diffusion.control.builders import VIDEO
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.video_jobs.job_requests import NewVideo
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.records import JobStatus, VideoJob
from vllm_omni.video_jobs.service import VideoJobs
from vllm_omni.video_jobs.settings import VideoJobSettings
from vllm_omni.video_jobs.views import VideoView

MODEL, OWNER = "painter", "owner"
NUM_FRAMES, NUM_STEPS = 17, 4
"""Frames and steps of a video by default."""
SLOW_DECODE = make_ready(decode_units_per_token=100.0)
"""A piece of a decode is one latent frame."""


@dataclass
class Server:
    """A service, its engine and its device."""

    videos: VideoJobs
    omni: AsyncOmni
    device: FakeExecutor
    media: Path

    def new_video(self, prompt: str = "a panda", owner: str = OWNER, **fields: Any) -> NewVideo:
        """Checked request. `fields`: those of NewVideo, or of OmniDiffusionSamplingParams."""
        own = {name: fields.pop(name) for name in ("output_format", "input_files") if name in fields}
        asked = OmniPrompt(prompt)
        checked = self.omni.check(asked, OmniDiffusionSamplingParams(**{"seed": 3, **fields}))
        return NewVideo(owner, MODEL, checked.prompt, checked, **own)

    async def create(self, prompt: str = "a panda", **fields: Any) -> VideoJob:
        return await self.videos.create(self.new_video(prompt, **fields))

    async def remix(self, job_id: str, owner: str = OWNER) -> VideoJob:
        """A job that makes a video again, of a bear; memory for its pictures is not bounded."""
        return await self.videos.remix(job_id, owner, "a bear", lambda num_bytes: None)

    async def ended(self, job_id: str, owner: str = OWNER) -> VideoJob:
        """The job once it has completed or failed."""
        async for event in self.videos.events(job_id, owner):
            last = event
        return last.view.job

    async def view(self, job_id: str) -> VideoView:
        return await self.videos.get(job_id, OWNER)

    async def until_status(self, job_id: str, status: JobStatus) -> VideoView:
        """Wait for a status; return the view that has it."""
        views: list[VideoView] = []

        async def has_status() -> bool:
            views.append(await self.view(job_id))
            return views[-1].job.status == status

        while not await has_status():
            await until_next_turn()
        return views[-1]

    def files(self) -> list[str]:
        """Names of all stored files, within the media store."""
        return sorted(
            os.path.relpath(os.path.join(folder, name), self.media)
            for folder, _, names in os.walk(self.media)  # which passes over folders that are removed meanwhile
            for name in names
        )


async def until_next_turn() -> None:
    """Let other tasks and threads run."""
    await asyncio.sleep(0.005)


def store_settings(folder: Path, **changes: Any) -> VideoJobSettings:
    """Settings with which no test reaches a lease's end unless it asks for that, and which look often."""
    settings = VideoJobSettings(
        job_store=f"sqlite:///{folder}/jobs.sqlite",
        lease_seconds=GUARD_SECONDS,
        poll_seconds=0.02,
        sweep_seconds=0.02,
    )
    return replace(settings, **changes)


@asynccontextmanager
async def running_server(
    folder: Path,
    device: FakeExecutor | None = None,
    observer: VideoObserver | None = None,
    info: ModelInfo = VIDEO,
    config: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A started server whose stores are in `folder`. `settings`: fields of VideoJobSettings."""
    device = device or FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE))
    with (
        patch("vllm_omni.omni.make_executor", lambda *_: device),
        patch("vllm_omni.omni.load_model_info", lambda *_: info),
        patch("vllm_omni.omni.check_model_files"),
    ):
        omni = AsyncOmni("video", **(config or {}))
    async with omni:
        videos = VideoJobs(omni, store_settings(folder, **settings), MODEL, observer)
        await videos.start()
        try:
            yield Server(videos, omni, device, folder / "media")
        finally:
            device.hold = False  # a device that does not answer would delay the end
            device.release_results(len(device.pending))
            await videos.close()
