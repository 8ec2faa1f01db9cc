"""A whole pipeline with an adapter over HTTP, with the SDK: a small real model."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from testbed.live_server import MODEL_NAME, LiveServer, live_server
from testbed.runner_driver import psnr
from testbed.tiny_diffusers import build_tiny_diffusers, save_tiny_adapter
from vllm_omni.inputs.adapter_files import WEIGHTS

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_diffusers("StableDiffusion3Pipeline", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_adapter(model, tmp_path_factory.mktemp("adapters") / "ink", 0)


@pytest.fixture(scope="module")
def server(model: Path, adapter: Path) -> Iterator[LiveServer]:
    settings = {"served_model_names": ("tiny",)}
    with live_server(
        model=model, settings=settings, distributed_executor_backend="uni", lora_modules={"ink": str(adapter)}
    ) as running:
        yield running


def test_the_sdk_gets_diffusers_own_pictures(sdk: openai.OpenAI, model: Path) -> None:
    raw = sdk.images.with_raw_response.generate(
        model="tiny", prompt=PROMPT, n=2, size="96x64", extra_body={"seed": 5, "guidance_scale": 4.0}
    )
    assert "x-omni-ignored-fields" not in raw.headers
    pictures = [Image.open(io.BytesIO(base64.b64decode(item.b64_json))) for item in raw.parse().data]
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for seed, picture in zip((5, 6), pictures, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        sizes = {"height": 64, "width": 96, "num_inference_steps": 4, "max_sequence_length": 128}
        expected = pipeline(PROMPT, guidance_scale=4.0, generator=generator, **sizes).images[0]
        assert psnr(np.array(picture), np.array(expected)) >= 60


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        (
            {"true_cfg_scale": 4.0},
            "true_cfg_scale",
            "it takes height, width, num_inference_steps, negative_prompt, guid",
        ),
        ({"max_sequence_length": 129}, "max_sequence_length", "1 to 128"),
        ({"stream": True, "partial_images": 1}, "partial_images", "no previews"),
        ({"prompt": "apple " * 200}, "prompt", "at most 128 are accepted"),
        ({"lora": {"name": "oil"}}, "lora", "no LoRA adapter 'oil'; served: ink"),
        ({"lora": {"name": "ink", "scale": 1000}}, "lora.scale", "from -100 to 100"),
        ({"lora": {"name": "ink", "path": "/ink"}}, "lora.path", "no field that is taken here"),
        ({"lora": "ink"}, "lora", "lora: "),
        ({"model": "ink", "lora": {"name": "oil"}}, "lora", "names 'oil', and model names 'ink'"),
    ],
)
def test_a_wrong_parameter_is_a_400_that_names_it(
    sdk: openai.OpenAI, extra: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        sdk.images.generate(model="tiny", prompt=PROMPT, extra_body=extra)
    assert refused.value.body["param"] == param


def test_a_request_names_an_adapter(sdk: openai.OpenAI, model: Path, adapter: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(adapter), weight_name=WEIGHTS, adapter_name="ink")
    sizes = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 128}
    for name, lora, scale in (
        ("tiny", {"name": "ink"}, 1.0),
        ("tiny", None, 0.0),
        ("ink", None, 1.0),
        ("ink", {"name": "ink", "scale": 0.5}, 0.5),
    ):
        extra = {"seed": 5, "guidance_scale": 1.0, "lora": lora}
        raw = sdk.images.with_raw_response.generate(model=name, prompt=PROMPT, extra_body=extra)
        assert "x-omni-ignored-fields" not in raw.headers
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(raw.parse().data[0].b64_json))))
        pipeline.set_adapters("ink", scale)
        generator = torch.Generator("cpu").manual_seed(5)
        expected = pipeline(PROMPT, guidance_scale=1.0, generator=generator, **sizes).images[0]
        assert psnr(picture, np.array(expected)) >= 60


def test_the_adapters_are_listed(http: httpx.Client) -> None:
    card = {
        "id": "ink",
        "object": "lora",
        "file": f"ink/{WEIGHTS}",
        "source": "start",
        "state": "device",
        "defaults": {},
    }
    assert http.get("/v1/loras").json() == {"object": "list", "data": [card]}
    models = http.get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in models] == [("tiny", None), ("ink", "tiny")]
    text = http.get("/metrics").text
    assert f'vllm_omni:lora_adapters{{model_name="{MODEL_NAME}",state="device"}} 1.0' in text
    assert f'vllm_omni:lora_loads_total{{model_name="{MODEL_NAME}"}}' in text
    assert f'vllm_omni:lora_load_seconds_sum{{model_name="{MODEL_NAME}"}}' in text
