"""`/v1/videos` and chats with a whole pipeline that makes videos."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from testbed.live_server import live_server
from testbed.runner_driver import psnr
from testbed.tiny_diffusers import build_tiny_diffusers
from tests.entrypoints.openai.routes.test_chat_completions import CHAT, says
from tests.entrypoints.openai.routes.test_video_chats import file_of
from tests.entrypoints.openai.routes.test_videos import frames_of
from tests.entrypoints.openai.routes.videos import VIDEOS, made

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
NAME, PROMPT = "SkyReelsV2Pipeline", "a red apple"
OPTIONS = {"seed": 3, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 64}


def test_a_job_and_a_chat_have_diffusers_own_frames(tmp_path: Path) -> None:
    path = build_tiny_diffusers(NAME, tmp_path / NAME)
    with (
        live_server(model=path, distributed_executor_backend="uni") as running,
        httpx.Client(base_url=running.url) as http,
    ):
        body = {**OPTIONS, "size": "64x64"}
        video = made(http, prompt=PROMPT, **body)
        job = frames_of(http.get(f"{VIDEOS}/{video['id']}/content").content)
        choice = http.post(CHAT, json={"messages": [says(PROMPT)], **body}).json()["choices"][0]
        chat = frames_of(file_of(choice["message"]["videos"][0]))
        assert http.post("/v1/images/generations", json={"prompt": PROMPT, "size": "64x64"}).status_code == 200
    assert np.array_equal(job, chat)
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {name: value for name, value in OPTIONS.items() if name != "seed"}
    generator = torch.Generator("cpu").manual_seed(3)
    output = pipeline(prompt=PROMPT, height=64, width=64, generator=generator, output_type="pil", **options)
    expected = np.stack([np.array(frame) for frame in output.frames[0]])
    assert psnr(luma(job), luma(expected)) >= 30, "a lossy file of noisy frames"
    assert psnr(luma(job), luma(expected[:, ::-1])) < 20


def luma(frames: np.ndarray) -> np.ndarray:
    """Brightness [frames, height, width] of frames; files halve the resolution of colours."""
    brightness: np.ndarray = frames @ np.array([0.2126, 0.7152, 0.0722])
    return brightness
