"""Edits of whole pipelines over HTTP: a small real model, and refusals of other models."""

from __future__ import annotations

import base64
import io
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from testbed.fakes import as_whole
from testbed.live_server import (
    FAKE_EDIT_INFO,
    FAKE_INFO,
    FakeImageInput,
    LiveServer,
    live_server,
)
from testbed.runner_driver import psnr
from testbed.tiny_diffusers import build_tiny_diffusers, set_safety_checker
from testbed.tiny_models import photo
from tests.entrypoints.openai.routes.test_image_edits import EDITS, data_url, file_of, pixels
from tests.entrypoints.openai.routes.test_probes_and_metrics import read_metrics
from vllm_omni.diffusion.catalog import model_info
from vllm_omni.diffusion.catalog.whole_info import WholePipeline
from vllm_omni.inputs.images import InputImage, resize_image

# diffusers' own schedules of Stable Diffusion XL.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
GENERATIONS, CHAT = "/v1/images/generations", "/v1/chat/completions"
PROMPT = "a red apple"
PHOTO = photo(96, 64, 1)
EITHER_INFO = replace(FAKE_EDIT_INFO, image_input=FakeImageInput(min_images=0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "StableDiffusionXLImg2ImgPipeline"
    return build_tiny_diffusers(name, tmp_path_factory.mktemp("models") / name)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    with live_server(model=model, distributed_executor_backend="uni") as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """The picture that diffusers makes from PHOTO with seed 5 and strength 0.75."""
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    arguments = {"image": PHOTO, "strength": 0.75, "num_inference_steps": 4}
    return np.array(pipeline(PROMPT, generator=generator, **arguments).images[0])


def test_a_blocked_picture_is_openais_error(tmp_path: Path) -> None:
    """One blocked picture of `n` fails the request, also in a stream."""
    path = build_tiny_diffusers("StableDiffusionPipeline", tmp_path / "sd")
    set_safety_checker(path, blocks=True)
    with live_server(model=path, distributed_executor_backend="uni") as running:
        for more in ({}, {"n": 2}):
            response = httpx.post(running.url + GENERATIONS, json={"prompt": PROMPT, "size": "64x64", **more})
            assert response.status_code == 400
            assert response.headers["x-should-retry"] == "false"
            assert response.json()["error"] == {
                "message": "the model's safety checker blocked the picture",
                "type": "image_generation_user_error",
                "param": None,
                "code": "moderation_blocked",
            }
        response = httpx.post(running.url + GENERATIONS, json={"prompt": PROMPT, "size": "64x64", "stream": True})
        assert '"code":"moderation_blocked"' in response.text.replace(" ", "")


def refusal(response: httpx.Response) -> tuple[str, str]:
    """The `param` and the message of a 400."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def test_the_sdk_gets_diffusers_own_edit(sdk: openai.OpenAI, expected: np.ndarray) -> None:
    answer = sdk.images.edit(image=file_of(PHOTO), prompt=PROMPT, extra_body={"seed": 5, "strength": 0.75})
    assert answer.data is not None
    assert answer.size == "96x64"
    assert psnr(pixels(answer.data[0].b64_json), expected) >= 60


def test_a_chat_gets_the_same(http: httpx.Client, expected: np.ndarray) -> None:
    parts = [
        {"type": "text", "text": PROMPT},
        {"type": "image_url", "image_url": {"url": data_url(PHOTO)}},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "seed": 5, "strength": 0.75}
    answer = http.post(CHAT, json=body).json()
    url = answer["choices"][0]["message"]["images"][0]["image_url"]["url"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    assert psnr(picture, expected) >= 60


@pytest.mark.parametrize(
    ("data", "fields", "param", "words"),
    [
        (file_of(PHOTO)[:-200], {}, "image", "broken PNG"),
        (b"GIF89a", {}, "image", "PNG, JPEG and WebP"),
        (file_of(PHOTO), {"strength": "1.5"}, "strength", "less than or equal to 1"),
        (file_of(PHOTO), {"strength": "much"}, "strength", "takes a number"),
        (file_of(PHOTO), {"size": "60x64"}, "size", "multiples of 8"),
        (file_of(PHOTO), {"mask": "x"}, "mask", "no model here takes one"),
    ],
)
def test_bad_edits_are_refused_by_name(
    http: httpx.Client, data: bytes, fields: dict[str, str], param: str, words: str
) -> None:
    got, message = refusal(http.post(EDITS, files={"image": data}, data={"prompt": PROMPT, **fields}))
    assert got == param
    assert words in message


def test_large_pictures_are_resized_in_a_thread_for_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the thread that counts tokens for everybody. From then on only the resized picture is in memory."""
    threads: list[tuple[str, bool]] = []
    sent: list[weakref.ref[InputImage]] = []

    def watched(image: InputImage, height: int, width: int) -> InputImage:
        sent.append(weakref.ref(image))
        same = resize_image(image, height, width)
        threads.append((threading.current_thread().name.partition("_")[0], same is image))
        return same

    monkeypatch.setattr(model_info, "resize_image", watched)
    info = as_whole(FAKE_EDIT_INFO, WholePipeline("Any", ("height", "width"), "callback", 1, follows_input=True))
    large = file_of(Image.new("RGB", (1000, 800)))
    with live_server(info=info) as server, ThreadPoolExecutor(1) as pool:
        server.call(server.device.pause)
        fields = {"prompt": PROMPT, "size": "64x48"}
        answer = pool.submit(httpx.post, server.url + EDITS, files={"image": large}, data=fields)
        try:
            server.wait_until(lambda: server.num_unfinished() == 1 or answer.done())
            held, is_gone = server.app.state.upload_budget.num_bytes, sent[0]() is None
        finally:
            server.call(server.device.resume)
        assert answer.result().status_code == 200
        ((image,),) = server.device.images.values()
    assert threads == [("omni-resize", False)], "checked once"
    assert is_gone, "counted no longer, and still in memory"
    assert image.reference.shape == (48, 64, 3)
    assert image.num_bytes <= held < image.num_bytes + len(large) + 2**12


@pytest.mark.parametrize(("strength", "num_steps"), [("0.5", 2), ("1", 4)])
def test_steps_are_counted_that_the_pipeline_made(
    http: httpx.Client, server: LiveServer, strength: str, num_steps: int
) -> None:
    before = read_metrics(server)
    answer = http.post(EDITS, files={"image": file_of(PHOTO)}, data={"prompt": PROMPT, "strength": strength}).json()
    assert answer["timings"]["computed_steps"] == num_steps
    name = "vllm_omni:inference_steps_total{kind=computed}"
    assert read_metrics(server)[name] == before[name] + num_steps


def test_a_strength_of_no_step_is_a_400(http: httpx.Client, server: LiveServer) -> None:
    before = read_metrics(server)
    fields = {"prompt": PROMPT, "strength": "0.1"}
    param, message = refusal(http.post(EDITS, files={"image": file_of(PHOTO)}, data=fields))
    assert param == "strength"
    assert message == "strength 0.1 of 4 steps leaves no step"
    param, message = refusal(http.post(EDITS, files={"image": file_of(PHOTO)}, data={**fields, "strength": "0"}))
    assert param == "strength"
    assert message.startswith("strength takes a number above 0")
    after = read_metrics(server)
    rejected, failed = "vllm_omni:requests_rejected_total{reason=invalid}", "vllm_omni:requests_failed_total"
    assert after[rejected] == before[rejected] + 2
    assert after[failed] == before[failed]


def test_a_generation_says_where_to_go(http: httpx.Client) -> None:
    param, message = refusal(http.post(GENERATIONS, json={"prompt": PROMPT}))
    assert param == "image"
    assert "POST /v1/images/edits" in message


def test_strength_is_refused_where_the_model_has_none() -> None:
    with live_server(info=FAKE_EDIT_INFO) as running, httpx.Client(base_url=running.url) as http:
        fields = {"prompt": "x", "strength": "0.5"}
        edit = http.post(EDITS, files={"image": file_of(PHOTO)}, data=fields)
        assert refusal(edit)[0] == "strength"
    with live_server() as running, httpx.Client(base_url=running.url) as http:
        assert refusal(http.post(GENERATIONS, json={"prompt": "x", "strength": 0.5}))[0] == "strength"


def test_a_model_of_both_takes_both_and_edits_need_a_picture() -> None:
    def chat(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}]}

    with live_server(info=EITHER_INFO) as running, httpx.Client(base_url=running.url) as http:
        assert http.post(GENERATIONS, json={"prompt": "x"}).status_code == 200
        assert http.post(CHAT, json=chat()).status_code == 200
        assert list(running.device.images.values()) == [(), ()]
        part = {"type": "image_url", "image_url": {"url": data_url(PHOTO)}}
        assert http.post(CHAT, json=chat(part)).status_code == 200
        assert http.post(EDITS, files={"image": file_of(PHOTO)}, data={"prompt": "x"}).status_code == 200
        for none in ({"data": {"prompt": "x"}, "files": {"user": (None, "me")}}, {"json": {"prompt": "x"}}):
            param, message = refusal(http.post(EDITS, **none))
            assert param == "image"
            assert "/v1/images/generations" in message


def test_messages_have_the_names_of_http() -> None:
    info = as_whole(FAKE_INFO, WholePipeline("Any", ("num_inference_steps", "sigmas"), "callback", 1))
    with live_server(info=info) as running, httpx.Client(base_url=running.url) as http:
        previews = refusal(http.post(GENERATIONS, json={"prompt": "x", "stream": True, "partial_images": 2}))
        assert previews == ("partial_images", "partial_images 2: this model gives no previews (partial images)")
        param, message = refusal(http.post(GENERATIONS, json={"prompt": "x", "negative_prompt": "y" * 9999}))
        assert param == "negative_prompt"
        assert message.startswith("negative_prompt 'yyy")
        assert message.endswith("y: this model has no such parameter; it takes height, width, num_inference_steps")
        assert len(message) < 200


def test_a_form_names_an_adapter_by_keys_or_in_json(tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    file.touch()
    info = as_whole(FAKE_EDIT_INFO, WholePipeline("Any", ("height", "width"), "callback", 1, takes_lora=True))
    with live_server(info=info, lora_modules={"ink": str(file)}) as running, httpx.Client(base_url=running.url) as http:

        def edit(**fields: str) -> httpx.Response:
            return http.post(EDITS, files={"image": file_of(PHOTO)}, data={"prompt": "x", **fields})

        for fields in (
            {"lora[name]": "ink", "lora[scale]": "0.8"},
            {"lora": '{"name": "ink"}'},
            {"lora": '{"name": "ink", "scale": 0.8}'},
            {"lora": ' {"name": "ink", "scale": null}'},
            {"lora": '[{"name": "ink", "scale": 0.8}]'},
            {"lora": "[]"},
            {"lora[]": '{"name": "ink", "scale": 0.8}'},
            {"lora[][name]": "", "lora[]": ""},
        ):
            assert edit(**fields).status_code == 200, fields
        for text, param, words in (
            ('{"name": "ink", "scale": 1000}', "lora.scale", "got 1000.0"),
            ('{"name": "oil"}', "lora", "no LoRA adapter 'oil'"),
            ('{"name": ["ink"]}', "lora.name", "takes a string"),
            ('{"name": "ink", "path": "/ink"}', "lora.path", "no field that is taken here"),
            ('{"scale": 1}', "lora.name", "required"),
            ("ink", "lora", 'such as {"name": "ink", "scale": 0.8}, or a list of them, got \'ink\''),
            ("{'name': 'ink'}", "lora", "takes a JSON object"),
            ('{"name": 5}', "lora", "name of an adapter takes a string, got 5"),
            ('[{"name": "ink"}, {"name": 1.5}]', "lora", "name of an adapter takes a string, got 1.5"),
            ('["ink"]', "lora.0", "takes a JSON object"),
            ('[{"name": "ink", "scale": 1000}]', "lora.scale", "got 1000.0"),
            ('[{"name": "ink"}, {"name": "ink"}]', "lora", "each adapter once"),
            ("[" * 90_000, "lora", "takes a JSON object"),
        ):
            got, message = refusal(edit(lora=text))
            assert got == param
            assert words in message
