"""`/v1/images` and `/v1/models` with a model that makes videos: pictures are videos of one frame."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from testbed.fakes import as_whole
from testbed.live_server import (
    FAKE_EDIT_INFO,
    FAKE_INFO,
    FAKE_VIDEO_INFO,
    MODEL_NAME,
    FakeImageInput,
    LiveServer,
    expected_picture,
    live_server,
)
from testbed.runner_driver import psnr
from testbed.tiny_models import photo
from testbed.tiny_wan import build_tiny_wan
from tests.entrypoints.openai.routes.test_image_edits import EDITS, file_of, pixels
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.whole_info import WholePipeline

GENERATIONS = "/v1/images/generations"
PROMPT, STEPS, SCALE = "a red apple", 3, 4.0
SIZE = {"height": 32, "width": 48}
FROM_PICTURES = replace(FAKE_VIDEO_INFO, image_input=FakeImageInput())
FROM_BOTH = replace(FAKE_VIDEO_INFO, image_input=FakeImageInput(min_images=0))
WHOLE = as_whole(
    FAKE_VIDEO_INFO, WholePipeline("SkyReelsV2Pipeline", ("num_inference_steps", "num_frames"), "callback_on_step", 1)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wan"
    return build_tiny_wan(path, "t2v-a14b", default_sampling_params={"height": 64, "width": 64, "num_frames": 9})


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    settings: dict[str, Any] = {"default_sampling_params": {"num_frames": 5}, "distributed_executor_backend": "uni"}
    with live_server(model=model, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, np.ndarray]:
    """Seed -> the picture that diffusers makes with one frame."""
    pipeline = WanPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "guidance_scale_2": 2.0, "num_frames": 1}
        output = pipeline(PROMPT, "a car", generator=generator, output_type="np", **SIZE, **settings)
        frame: np.ndarray = output.frames[0][0]
        return (frame * 255).round().astype(np.uint8)

    return {seed: draw(seed) for seed in (5, 6)}


OPTIONS: dict[str, Any] = {
    "seed": 5,
    "num_inference_steps": STEPS,
    "negative_prompt": "a car",
    "guidance_scale": SCALE,
    "guidance_scale_2": 2.0,
}


def test_the_sdk_gets_diffusers_own_pictures(sdk: openai.OpenAI, expected: dict[int, np.ndarray]) -> None:
    answer = sdk.images.generate(prompt=PROMPT, n=2, size="48x32", extra_body=OPTIONS)
    assert answer.size == "48x32"
    for picture, seed in zip(answer.data, (5, 6), strict=True):
        made = pixels(picture.b64_json)
        assert made.std() > 5, "a flat picture proves nothing"
        assert psnr(made, expected[seed]) >= 60


def test_a_stream_has_previews_and_the_same_picture(http: httpx.Client, expected: dict[int, np.ndarray]) -> None:
    body = {"prompt": PROMPT, "size": "48x32", "stream": True, "partial_images": 2, **OPTIONS}
    text = http.post(GENERATIONS, json=body).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    previews = [pixels(event["b64_json"]) for event in events]
    assert all(preview.shape == (32, 48, 3) for preview in previews)
    assert psnr(previews[-1], expected[5]) >= 60
    assert psnr(previews[0], previews[-1]) < 60


def test_a_link_leads_to_the_same_picture(http: httpx.Client, expected: dict[int, np.ndarray]) -> None:
    body = {"prompt": PROMPT, "size": "48x32", "response_format": "url", "num_frames": 1, "seconds": 0, **OPTIONS}
    answer = http.post(GENERATIONS, json=body).json()
    file = httpx.get(answer["data"][0]["url"])
    assert file.headers["content-type"] == "image/png"
    assert psnr(np.asarray(Image.open(io.BytesIO(file.content))), expected[5]) >= 60
    assert answer["ignored_fields"] == []


def refusal(response: httpx.Response) -> tuple[str, str]:
    """The `param` and the message of a 400."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"num_frames": 5}, "num_frames", "num_frames takes 1 for a picture, got 5: POST /v1/videos makes videos"),
        ({"seconds": 0.5}, "seconds", "seconds takes 0 for a picture, got 0.5: POST /v1/videos makes videos"),
        ({"seconds": "2"}, "seconds", "seconds takes 0 for a picture, got 2.0: POST /v1/videos makes videos"),
        ({"num_frames": 0}, "num_frames", "num_frames: input should be greater than or equal to 1, got 0"),
        ({"seconds": -1}, "seconds", "seconds: input should be greater than or equal to 0, got -1"),
        ({"num_frames": "5"}, "num_frames", "num_frames: takes an integer, got '5'"),
        ({"flow_shift": 1000}, "flow_shift", "flow_shift takes a number from 0.01 to 100, got 1000.0"),
    ],
)
def test_lengths_of_videos_and_wrong_values_are_refused(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    assert refusal(http.post(GENERATIONS, json={"prompt": "x", **fields})) == (param, message)


@pytest.mark.parametrize("info", [FAKE_VIDEO_INFO, FROM_BOTH, WHOLE], ids=["packed", "both", "whole"])
def test_text_becomes_pictures_of_the_default_size(info: ModelInfo) -> None:
    with live_server(info=info) as running, httpx.Client(base_url=running.url) as http:
        answer = http.post(GENERATIONS, json={"prompt": "x", "n": 2, "seed": 3}).json()
        for item, seed in zip(answer["data"], (3, 4), strict=True):
            assert np.array_equal(pixels(item["b64_json"]), expected_picture(seed))


EDIT = "The served model makes videos and edits no pictures: POST /v1/videos makes videos"


@pytest.mark.parametrize(
    ("info", "generation", "edit"),
    [
        (FAKE_VIDEO_INFO, None, f"{EDIT}, and POST /v1/images/generations pictures from text."),
        (FROM_BOTH, None, f"{EDIT}, also from pictures, and POST /v1/images/generations pictures from text."),
        (
            FROM_PICTURES,
            "The served model makes videos from pictures: use POST /v1/videos.",
            f"{EDIT} from pictures.",
        ),
    ],
    ids=["text", "both", "pictures"],
)
def test_requests_that_are_for_videos_say_so(info: ModelInfo, generation: str | None, edit: str) -> None:
    """Before the body is read: a form of 3 MB is beyond no limit, and is not decoded."""
    with live_server(info=info) as running, httpx.Client(base_url=running.url) as http:
        if generation is not None:
            assert refusal(http.post(GENERATIONS, json={"prompt": "x"})) == ("image", generation)
        files = {"image": file_of(photo(96, 64, 1)) + b"\0" * 3 * 2**20}
        assert refusal(http.post(EDITS, files=files, data={"prompt": "x"})) == ("model", edit)
        assert not running.device.prompts
        schema = http.get("/openapi.json").json()["paths"]
        assert (GENERATIONS in schema) == (generation is None)
        assert EDITS not in schema


def test_a_model_of_pictures_refuses_lengths_itself() -> None:
    with live_server() as running, httpx.Client(base_url=running.url) as http:
        param, message = refusal(http.post(GENERATIONS, json={"prompt": "x", "num_frames": 5}))
        assert (param, message) == ("num_frames", "num_frames 5: this model makes single pictures")
        param, message = refusal(http.post(GENERATIONS, json={"prompt": "x", "seconds": 1}))
        assert (param, message.partition(":")[0]) == ("seconds", "seconds 1.0")
        assert http.post(GENERATIONS, json={"prompt": "x", "num_frames": 1}).status_code == 200


@pytest.mark.parametrize(
    ("info", "takes", "makes"),
    [
        (FAKE_INFO, ["text"], ["image"]),
        (FAKE_EDIT_INFO, ["text", "image"], ["image"]),
        (FAKE_VIDEO_INFO, ["text"], ["image", "video"]),
        (FROM_BOTH, ["text", "image"], ["image", "video"]),
        (FROM_PICTURES, ["text", "image"], ["video"]),
    ],
)
def test_models_say_what_they_take_and_make(info: ModelInfo, takes: list[str], makes: list[str]) -> None:
    with live_server(info=info) as running, httpx.Client(base_url=running.url) as http:
        cards = [*http.get("/v1/models").json()["data"], http.get(f"/v1/models/{MODEL_NAME}").json()]
        assert {(tuple(c["input_modalities"]), tuple(c["output_modalities"])) for c in cards} == {
            (tuple(takes), tuple(makes))
        }
