"""Adapters of a packed family over HTTP and offline: forms of `lora`, pictures of diffusers, errors."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.live_server import LiveServer, live_server
from testbed.runner_driver import make_request, psnr
from testbed.tiny_adapters import random_pairs, save_kohya, save_peft, transformer_of
from tests.diffusion.compute.families.qwen_image.test_pictures import draw, reference
from vllm_omni import Omni
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, transformer = tmp_path_factory.mktemp("adapters"), transformer_of(tiny_model)
    return {
        "ink": save_peft(random_pairs(transformer, 1), folder / "ink.safetensors"),
        "oil": save_kohya(random_pairs(transformer, 2, part="attn"), folder / "oil.safetensors"),
    }


@pytest.fixture(scope="module")
def wanted(tiny_model: Path, files: dict[str, Path]) -> dict[tuple[float, float], np.ndarray]:
    """Pictures of diffusers by the scales of ink and oil."""
    pipeline = reference(tiny_model)
    for name, file in files.items():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pictures = {}
    for scales in ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)):
        pipeline.set_adapters(list(files), list(scales))
        picture = draw(pipeline, make_request("r", PROMPT, seed=5))
        pictures[scales] = (picture * 255).round().astype(np.uint8)
    return pictures


@pytest.fixture(scope="module")
def server(tiny_model: Path, files: dict[str, Path]) -> Iterator[LiveServer]:
    with live_server(
        model=tiny_model,
        settings={"served_model_names": ("tiny",)},
        distributed_executor_backend="uni",
        lora_modules={name: str(file) for name, file in files.items()},
    ) as running:
        yield running


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")


def test_requests_name_one_or_several(sdk: openai.OpenAI, wanted: dict[tuple[float, float], np.ndarray]) -> None:
    both = [{"name": "oil"}, {"name": "ink", "scale": 0.5}]
    for model, lora, scales in (
        ("tiny", {"name": "ink"}, (1.0, 0.0)),
        ("tiny", [{"name": "ink", "scale": 1}], (1.0, 0.0)),
        ("ink", None, (1.0, 0.0)),
        ("tiny", both, (0.5, 1.0)),
        ("ink", both, (0.5, 1.0)),
        ("tiny", None, (0.0, 0.0)),
        ("tiny", [], (0.0, 0.0)),
    ):
        raw = sdk.images.with_raw_response.generate(model=model, prompt=PROMPT, extra_body={"seed": 5, "lora": lora})
        assert "x-omni-ignored-fields" not in raw.headers
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(raw.parse().data[0].b64_json))))
        assert psnr(picture, wanted[scales]) >= 55
    assert psnr(wanted[0.0, 0.0], wanted[1.0, 0.0]) < 40
    assert psnr(wanted[0.5, 1.0], wanted[1.0, 0.0]) < 40


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"lora": [{"name": "tar"}]}, "lora", "no LoRA adapter 'tar'; served: ink, oil"),
        ({"lora": [{"name": "ink"}, {"name": "ink"}]}, "lora", "each adapter once, got 'ink' again"),
        ({"lora": [{"name": "ink"}, {"scale": 1}]}, "lora.1.name", "required"),
        ({"lora": [{"name": "ink", "path": "/x"}]}, "lora.0.path", "no field that is taken here"),
        ({"lora": [{"name": "ink", "scale": 1000}]}, "lora.scale", "from -100 to 100"),
        ({"lora": [{"name": "ink"}] * 9}, "lora", "at most 8 entries"),
        ({"lora": [{"name": "oil"}], "model": "ink"}, "lora", "names 'oil', and model names 'ink'"),
        ({"lora": [], "model": "ink"}, "lora", "names none, and model names 'ink'"),
        ({"lora": 3}, "lora", "takes a JSON object"),
    ],
)
def test_a_wrong_list_is_a_400_that_names_it(sdk: openai.OpenAI, body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        sdk.images.generate(prompt=PROMPT, extra_body=body)
    assert refused.value.body["param"] == param


def test_the_adapters_are_listed(http: httpx.Client) -> None:
    assert [card["id"] for card in http.get("/v1/loras").json()["data"]] == ["ink", "oil"]
    models = http.get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in models] == [("tiny", None), ("ink", "tiny"), ("oil", "tiny")]


def test_a_script_brings_paths(
    tiny_model: Path, files: dict[str, Path], wanted: dict[tuple[float, float], np.ndarray], tmp_path: Path
) -> None:
    ink, oil = (LoRARequest(name, file) for name, file in files.items())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no adapter")
    with Omni(model=str(tiny_model), distributed_executor_backend="uni") as omni:
        for params, scales in (
            ({"lora_request": ink}, (1.0, 0.0)),
            ({"lora_request": [ink, oil], "lora_scale": [0.5, 1.0]}, (0.5, 1.0)),
            ({"lora_requests": [oil, LoRARequest("ink", files["ink"], 0.5)]}, (0.5, 1.0)),
            ({}, (0.0, 0.0)),
        ):
            (output,) = omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=5, **params))
            assert psnr(np.array(output.images[0]), wanted[scales]) >= 55
        with pytest.raises(InvalidRequestError, match=r"the LoRA adapter .*broken.safetensors does not fit"):
            omni.generate(PROMPT, OmniDiffusionSamplingParams(lora_request=LoRARequest("b", broken)))


def test_a_served_file_may_be_moved(
    tiny_model: Path, files: dict[str, Path], wanted: dict[tuple[float, float], np.ndarray], tmp_path: Path
) -> None:
    shutil.copy(files["ink"], tmp_path)
    with Omni(str(tiny_model), distributed_executor_backend="uni", lora_modules={"ink": tmp_path}) as omni:
        (tmp_path / files["ink"].name).unlink()
        params = OmniDiffusionSamplingParams(seed=5, lora_request=LoRARequest("ink"))
        (output,) = omni.generate(PROMPT, params)
    assert psnr(np.array(output.images[0]), wanted[1.0, 0.0]) >= 55
