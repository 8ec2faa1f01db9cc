"""POST /v1/images/generations by the OpenAI SDK: pictures, formats, seeds, fields."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
import time
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.live_server import (
    ALIAS,
    FAKE_INFO,
    MODEL_NAME,
    STEPS,
    LiveServer,
    expected_picture,
    live_server,
)
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.entrypoints.openai.responses import encoding


def opened(data: str | bytes | None) -> Image.Image:
    """The picture of a base64 string or a file's bytes."""
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def pixels(data: str | bytes | None) -> np.ndarray:
    return np.asarray(opened(data))


def test_png_holds_the_pixels_of_the_seed(sdk: openai.OpenAI) -> None:
    before = time.time()
    response = sdk.images.generate(prompt="a red apple", size="96x64", extra_body={"seed": 7})
    assert response.data is not None
    np.testing.assert_array_equal(pixels(response.data[0].b64_json), expected_picture(7, height=64, width=96))
    assert (response.size, response.output_format, response.background) == ("96x64", "png", "opaque")
    assert response.quality == "high"
    assert before - 1 <= response.created <= time.time() + 1
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (3, 24, 27)
    assert response.usage.input_tokens_details.text_tokens == 3
    assert response.usage.output_tokens_details is not None
    assert response.usage.output_tokens_details.image_tokens == 24
    timings = response.to_dict()["timings"]
    assert isinstance(timings, dict)
    assert set(timings) == {
        "queue", "text_encode", "denoise", "vae_decode", "media_encode", "total", "computed_steps",
        "cached_steps",
    }  # fmt: skip
    assert timings["computed_steps"] == STEPS


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_lossy_formats(sdk: openai.OpenAI, name: Any) -> None:
    def generate(compression: int) -> str:
        response = sdk.images.generate(
            prompt="x", size="256x256", output_format=name, output_compression=compression, extra_body={"seed": 1}
        )
        assert response.data is not None
        assert response.output_format == name
        return response.data[0].b64_json or ""

    fine, coarse = generate(90), generate(20)
    assert opened(fine).format == name.upper()
    np.testing.assert_array_equal(pixels(fine), by_pillow(1, name, quality=90))
    np.testing.assert_array_equal(pixels(coarse), by_pillow(1, name, quality=20))
    assert len(coarse) < len(fine) / 2


def by_pillow(seed: int, name: str, quality: int) -> np.ndarray:
    """A 256x256 picture, encoded and decoded again; colours at full resolution if the format has it."""
    file = io.BytesIO()
    options = {"subsampling": 0} if (name, quality) == ("jpeg", 90) else {}
    Image.fromarray(expected_picture(seed, 256, 256)).save(file, name, quality=quality, **options)
    return pixels(file.getvalue())


def test_n_pictures_have_consecutive_seeds(sdk: openai.OpenAI) -> None:
    response = sdk.images.generate(prompt="x", n=3, extra_body={"seed": 40})
    assert response.data is not None
    assert [image.to_dict()["seed"] for image in response.data] == [40, 41, 42]
    for image, seed in zip(response.data, (40, 41, 42), strict=True):
        np.testing.assert_array_equal(pixels(image.b64_json), expected_picture(seed, 64, 64))
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (1, 48)


def test_drawn_seed_is_reported_and_repeats(sdk: openai.OpenAI) -> None:
    first = sdk.images.generate(prompt="x")
    assert first.data is not None
    seed = first.data[0].to_dict()["seed"]
    second = sdk.images.generate(prompt="x", extra_body={"seed": seed})
    assert second.data is not None
    assert second.data[0].b64_json == first.data[0].b64_json


async def test_async_client(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        response = await client.images.generate(prompt="x", model=MODEL_NAME, extra_body={"seed": 3})
    assert response.data is not None
    np.testing.assert_array_equal(pixels(response.data[0].b64_json), expected_picture(3, 64, 64))


def test_null_is_absent(http: httpx.Client) -> None:
    fields = "model n size output_format output_compression response_format background stream partial_images quality "
    fields += "style moderation complexity user safety_identifier negative_prompt num_inference_steps guidance_scale "
    fields += "true_cfg_scale cfg_normalization cfg_truncation seed lora priority height width num_outputs_per_prompt"
    response = http.post("/v1/images/generations", json={"prompt": "x", **dict.fromkeys(fields.split())})
    assert response.status_code == 200, response.text
    assert response.json()["size"] == "64x64"
    assert "x-omni-ignored-fields" not in response.headers


def test_every_field_of_openai_is_taken(sdk: openai.OpenAI) -> None:
    response = sdk.images.generate(
        prompt="x", model=ALIAS, n=1, size="auto", quality="low", style="vivid", moderation="low", complexity="high",
        user="someone", background="opaque", output_format="png", output_compression=100, response_format="b64_json",
        extra_body={
            "negative_prompt": "blur", "num_inference_steps": 2, "true_cfg_scale": 3, "priority": -1,
            "safety_identifier": "me",
        },
    )  # fmt: skip
    assert response.quality == "low"
    assert response.to_dict()["safety_identifier"] == "me"
    assert response.to_dict()["timings"]["computed_steps"] == 2


@pytest.mark.parametrize("agreeing", [{}, {"size": "128x64", "n": 2}, {"size": "auto"}])
def test_names_of_vllm_omni_for_size_and_n(http: httpx.Client, agreeing: dict[str, Any]) -> None:
    body = {"prompt": "x", "seed": 8, "height": 64, "width": 128, "num_outputs_per_prompt": 2, **agreeing}
    response = http.post("/v1/images/generations", json=body)
    assert response.status_code == 200, response.text
    assert "x-omni-ignored-fields" not in response.headers
    for item, seed in zip(response.json()["data"], (8, 9), strict=True):
        np.testing.assert_array_equal(pixels(item["b64_json"]), expected_picture(seed, height=64, width=128))


def test_unknown_fields_are_named(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """The names are in a header, in the response and in the log."""
    body = {"prompt": "x", "cfg": 3, "bad\r\nname": 1, "partial_images": 2}
    with caplog.at_level("INFO", logger="vllm_omni.entrypoints.openai.routes.picture_service"):
        response = http.post("/v1/images/generations", json=body)
    assert response.status_code == 200
    assert response.headers["x-omni-ignored-fields"] == "cfg,bad??name,partial_images"
    assert response.json()["ignored_fields"] == ["cfg", "bad??name", "partial_images"]
    assert caplog.messages == ["/v1/images/generations: ignored fields: cfg, bad??name, partial_images"]
    assert http.post("/v1/images/generations", json={"prompt": "x"}).json()["ignored_fields"] == []
    body = {"prompt": "x", **{f"f{i}": 1 for i in range(23)}}
    names = http.post("/v1/images/generations", json=body).headers["x-omni-ignored-fields"].split(",")
    assert names == [*(f"f{i}" for i in range(20)), "+3 more"]


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"true_cfg_scale": 4}, "true_cfg_scale"),
        ({"negative_prompt": "blur"}, "negative_prompt"),
        ({"negative_prompt": "blur", "true_cfg_scale": 1}, "negative_prompt"),
        ({"true_cfg_scale": 1}, None),
        ({"negative_prompt": "", "true_cfg_scale": 4}, None),
    ],
)
def test_half_a_request_for_guidance_is_named(http: httpx.Client, fields: dict[str, Any], ignored: str | None) -> None:
    response = http.post("/v1/images/generations", json={"prompt": "x", **fields})
    assert response.status_code == 200
    assert response.headers.get("x-omni-ignored-fields") == ignored


def test_half_a_request_for_guidance_is_named_by_the_parameters_of_the_model() -> None:
    guidance = Guidance("guidance_scale", 1.0, None, ("cfg_truncation",))
    info = dataclasses.replace(
        FAKE_INFO, guidance=guidance, default_sampling_params={"height": 64, "width": 64, "num_inference_steps": 2}
    )
    with live_server(info=info) as running, httpx.Client(base_url=running.url) as client:
        body = {"prompt": "x", "negative_prompt": "y", "guidance_scale": 0, "cfg_truncation": 0.5}
        response = client.post("/v1/images/generations", json=body)
        assert response.headers["x-omni-ignored-fields"] == "negative_prompt,cfg_truncation"
        response = client.post("/v1/images/generations", json=body | {"guidance_scale": 0.5})
        assert "x-omni-ignored-fields" not in response.headers


def test_open_webui_body(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "a cat", "n": 1, "size": "512x512", "response_format": "b64_json"}
    response = http.post("/v1/images/generations", json=body)
    assert opened(response.json()["data"][0]["b64_json"]).size == (512, 512)


def test_librechat_body() -> None:
    """Its model is `gpt-image-1`: served only under that name if the operator says so."""
    body = {
        "model": "gpt-image-1", "prompt": "a cat", "background": "auto", "quality": "auto", "size": "auto",
        "output_format": "png", "n": 1,
    }  # fmt: skip
    names = {"served_model_names": (MODEL_NAME, "gpt-image-1")}
    with live_server(settings=names) as running, httpx.Client(base_url=running.url) as client:
        response = client.post("/v1/images/generations", json=body)
        assert opened(response.json()["data"][0]["b64_json"]).size == (64, 64)
        body["model"] = "gpt-image-2"
        response = client.post("/v1/images/generations", json=body)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_encoding_runs_in_its_own_threads(http: httpx.Client) -> None:
    threads = []

    def recording(*args: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return original(*args)

    original = encoding.encode
    with patch.object(encoding, "encode", recording):
        response = http.post("/v1/images/generations", json={"prompt": "x", "size": "1024x1024", "n": 2, "seed": 5})
    for i, item in enumerate(response.json()["data"]):
        np.testing.assert_array_equal(pixels(item["b64_json"]), expected_picture(5 + i, 1024, 1024))
    assert len(threads) == 2
    assert all(name.startswith("omni-encode") for name in threads)


@pytest.mark.parametrize("size", [1, 2, 3, 2**20 + 1])
def test_base64_in_json_is_exact(size: int) -> None:
    image = np.random.default_rng(0).bytes(size)
    before, after = encoding.json_around_image({"seed": 1})
    expected = b'{"b64_json":"' + base64.b64encode(image) + b'","seed":1}'
    assert encoding.base64_between(before, image, after) == expected


def test_prompts_are_counted_in_a_thread_of_their_own() -> None:
    """A long prompt takes the tokenizer tens of milliseconds."""
    threads = []

    def counting(prompt: str) -> int:
        threads.append(threading.current_thread().name)
        return len(prompt.split())

    info = dataclasses.replace(FAKE_INFO, count_prompt_tokens=counting)
    with live_server(info=info) as running:
        num_before = len(threads)
        assert num_before > 0, "warmed before the first request"
        httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x"})
    assert len(threads) == num_before + 1
    assert threads[-1].startswith("omni-check-prompt")


def test_cache_is_a_field_of_ours(http: httpx.Client) -> None:
    response = http.post("/v1/images/generations", json={"prompt": "x", "cache": False})
    assert response.status_code == 200
    assert "x-omni-ignored-fields" not in response.headers
    assert response.json()["timings"]["cached_steps"] == 0
    refused = http.post("/v1/images/generations", json={"prompt": "x", "cache": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cache"
