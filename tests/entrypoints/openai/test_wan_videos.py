"""Videos over HTTP of a real Wan: the files hold the frames that the engine makes of the same request."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.live_server import LiveServer, live_server
from testbed.tiny_models import photo
from testbed.tiny_wan import build_tiny_wan
from tests.entrypoints.openai.routes.test_image_edits import data_url, file_of
from tests.entrypoints.openai.routes.test_image_errors import error_of
from tests.entrypoints.openai.routes.videos import SYNC, VIDEOS
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.outputs import write_video

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT, NEGATIVE, PHOTO = "a red apple", "a car", photo(80, 56, 3)
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "guidance_scale_2": 2.0,
    "flow_shift": 5.0,
    "seed": 7,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    defaults: dict[str, object] = {"height": 32, "width": 48, "num_frames": 9}
    model = build_tiny_wan(tmp_path_factory.mktemp("models") / "wan", "i2v-a14b", default_sampling_params=defaults)
    with live_server(model=model, distributed_executor_backend="uni") as running:
        yield running


def decoded(data: bytes) -> np.ndarray:
    """uint8 [frames, height, width, 3] of a video file."""
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def expected(server: LiveServer, picture: Image.Image, folder: Path, **settings: Any) -> np.ndarray:
    """Frames of the engine's own video, after the same encoder."""

    async def make() -> Any:
        params = OmniDiffusionSamplingParams(output_type="np", **SETTINGS, **settings)
        outputs = server.omni.generate(OmniPrompt(PROMPT, NEGATIVE, (picture,)), params)
        return [output async for output in outputs][-1]

    output = server.call(make)
    write_video(output.images[0], folder / "expected.mp4", output.fps)
    return decoded((folder / "expected.mp4").read_bytes())


def test_a_job_from_a_picture(server: LiveServer, sdk: openai.OpenAI, tmp_path: Path) -> None:
    options = {**SETTINGS, "negative_prompt": NEGATIVE}
    options["shift"] = options.pop("flow_shift")
    video = sdk.videos.create_and_poll(
        prompt=PROMPT, input_reference=("a.png", file_of(PHOTO), "image/png"), seconds="0.5", extra_body=options
    )
    assert video.status == "completed", video.error
    frames = decoded(sdk.videos.download_content(video.id).content)
    assert frames.shape[0] == (video.model_extra or {})["num_frames"] == 9
    np.testing.assert_array_equal(frames, expected(server, PHOTO, tmp_path))
    remix = sdk.videos.poll(sdk.videos.remix(video.id, prompt=PROMPT).id)
    again = decoded(sdk.videos.download_content(remix.id).content)
    np.testing.assert_array_equal(again, frames, "the same prompt, picture and seed")


def test_a_video_without_a_job(server: LiveServer, http: httpx.Client, tmp_path: Path) -> None:
    body = {**SETTINGS, "prompt": PROMPT, "negative_prompt": NEGATIVE, "size": "32x48", "num_frames": 5}
    response = http.post(SYNC, json={**body, "input_reference": {"image_url": data_url(PHOTO)}})
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(
        decoded(response.content), expected(server, PHOTO, tmp_path, width=32, height=48, num_frames=5)
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "input_reference", "is required"),
        ({"input_reference": data_url(PHOTO), "true_cfg_scale": 3.0}, "true_cfg_scale", "guidance_scale"),
        ({"input_reference": data_url(PHOTO), "seconds": "4"}, "seconds", "the nearest valid value is 0.5"),
        ({"input_reference": data_url(PHOTO), "num_frames": 8}, "num_frames", "the nearest valid number is 9"),
        ({"input_reference": [data_url(PHOTO)] * 3}, "input_reference", "at most 2"),
    ],
)
def test_requests_that_the_model_does_not_take(
    http: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    response = http.post(VIDEOS, json={"prompt": PROMPT, **fields})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert "num_outputs_per_prompt" not in error["message"], "names of fields, not of the engine's parameters"
