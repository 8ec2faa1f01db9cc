"""Adapters of a packed family over HTTP and offline: forms of `lora`, pictures of diffusers, errors."""

from __future__ import annotations

import base64
import io
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors.torch import save_file

from testbed.live_server import LiveServer, live_server
from testbed.runner_driver import make_request, psnr
from testbed.tiny_adapters import random_pairs, save_kohya, save_peft, transformer_of
from tests.diffusion.compute.families.qwen_image.test_pictures import draw, reference
from vllm_omni import Omni
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.adapter_files import WEIGHTS
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams

PROMPT = "a red apple"
NAMES = {"ink": "ink", "oil": "oil", "fast": "ink", "slow": "oil"}
"""Name of each served adapter -> its file."""
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {"num_inference_steps": 2, "true_cfg_scale": 1.0, "sigmas": [1.0, 0.25]},
    "slow": {"true_cfg_scale": 3.0},
}


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, transformer = tmp_path_factory.mktemp("adapters"), transformer_of(tiny_model)
    return {
        "ink": save_peft(random_pairs(transformer, 1), folder / "ink.safetensors"),
        "oil": save_kohya(random_pairs(transformer, 2, part="attn"), folder / "oil.safetensors"),
    }


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path, files: dict[str, Path]) -> QwenImagePipeline:
    """diffusers with both adapters loaded."""
    pipeline = reference(tiny_model)
    for name, file in files.items():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    return pipeline


def draw_with(pipeline: QwenImagePipeline, ink: float, oil: float, **values: Any) -> np.ndarray:
    """Picture of diffusers with the adapters at these scales. values: of the request."""
    pipeline.set_adapters(["ink", "oil"], [ink, oil])
    return (draw(pipeline, make_request("r", PROMPT, seed=5, **values)) * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def wanted(pipeline: QwenImagePipeline) -> dict[tuple[float, float], np.ndarray]:
    """Pictures of diffusers by the scales of ink and oil."""
    return {scales: draw_with(pipeline, *scales) for scales in ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0))}


@pytest.fixture(scope="module")
def folder(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is served whole, with good adapters and with broken ones."""
    folder = tmp_path_factory.mktemp("folder")
    shutil.copy(files["oil"], folder / "paper.safetensors")
    (folder / "wet").mkdir()
    shutil.copy(files["ink"], folder / "wet" / WEIGHTS)
    (folder / "link.safetensors").symlink_to(files["ink"])
    with (folder / "huge.safetensors").open("wb") as huge:
        huge.write(struct.pack("<Q", 10 * 2**30) + b"{")
        huge.truncate(11 * 2**30)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    for name, key, rank, value in (
        ("nan", layer, 2, math.nan),
        ("rank", layer, 4096, 1.0),
        ("other", "transformer.single_blocks.0.linear1", 2, 1.0),
    ):
        down, up = torch.ones(rank, 48), torch.full((48, rank), value)
        save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(tiny_model: Path, files: dict[str, Path], folder: Path) -> Iterator[LiveServer]:
    with live_server(
        model=tiny_model,
        settings={"served_model_names": ("tiny",)},
        distributed_executor_backend="uni",
        lora_modules={name: str(files[file]) for name, file in NAMES.items()},
        lora_defaults=RECIPES,
        lora_dirs=(str(folder),),
        enable_lora_loading=True,
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
        ({"lora": 3}, "lora", "takes a JSON object such as"),
        ({"lora": "ink"}, "lora", "or a list of them, got 'ink'"),
    ],
)
def test_a_wrong_list_is_a_400_that_names_it(sdk: openai.OpenAI, body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        sdk.images.generate(prompt=PROMPT, extra_body=body)
    assert refused.value.body["param"] == param


def test_the_adapters_are_listed(http: httpx.Client, files: dict[str, Path]) -> None:
    listed = {card["id"]: card for card in http.get("/v1/loras").json()["data"]}
    assert list(listed) == ["ink", "oil", "fast", "slow", "huge", "nan", "other", "paper", "rank", "wet"]
    assert (listed["ink"]["file"], listed["ink"]["source"]) == ("ink.safetensors", "start")
    assert (listed["wet"]["file"], listed["wet"]["source"]) == (f"wet/{WEIGHTS}", "folder")
    assert {name: listed[name]["defaults"] for name in NAMES} == {"ink": {}, "oil": {}, **RECIPES}
    models = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert list(models) == ["tiny", *listed]
    assert {(card.get("parent"), "root" in card) for name, card in models.items() if name != "tiny"} == {("tiny", True)}
    assert "parent" not in models["tiny"]
    assert http.get("/v1/models/wet").json() == models["wet"]
    assert models["wet"]["root"] == f"wet/{WEIGHTS}"


def make(sdk: openai.OpenAI, model: str, **extra: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Picture of one request, and the body of its answer."""
    answer = sdk.images.generate(model=model, prompt=PROMPT, extra_body={"seed": 5, **extra})
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
    return picture, answer.model_dump()


def test_an_adapter_brings_its_recipe(sdk: openai.OpenAI, pipeline: QwenImagePipeline) -> None:
    steps_and_sigmas: Any = {"num_inference_steps": 2, "sigmas": (1.0, 0.25)}
    plain = draw_with(pipeline, 1, 0, **steps_and_sigmas, negative_prompt=None)
    guided = draw_with(pipeline, 1, 0, **steps_and_sigmas, negative_prompt="bad")
    for model, extra, expected, ignored in (
        ("fast", {}, plain, []),
        ("tiny", {"lora": {"name": "fast"}}, plain, []),
        ("tiny", {"lora": [{"name": "fast", "scale": 1.0}]}, plain, []),
        ("fast", {"negative_prompt": "bad"}, plain, ["negative_prompt"]),
        ("fast", {"negative_prompt": "bad", "true_cfg_scale": 4.0}, guided, []),
        ("fast", {"num_inference_steps": 4}, draw_with(pipeline, 1, 0, negative_prompt=None), []),
    ):
        picture, answer = make(sdk, model, **extra)
        assert answer["timings"]["computed_steps"] == extra.get("num_inference_steps", 2)
        assert answer["ignored_fields"] == ignored
        assert psnr(picture, expected) >= 55
    assert psnr(plain, guided) < 40
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = sdk.chat.completions.create(model="fast", messages=messages, extra_body={"seed": 5}).model_dump()
    assert chat["timings"]["computed_steps"] == 2
    with pytest.raises(
        openai.BadRequestError, match=r"the adapters 'fast' and 'slow' have different defaults, 1.0 and 3.0: give"
    ):
        make(sdk, "tiny", lora=[{"name": "fast"}, {"name": "slow"}])
    make(sdk, "tiny", lora=[{"name": "fast"}, {"name": "slow"}], true_cfg_scale=1.0)


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def test_adapters_are_loaded_and_unloaded(
    sdk: openai.OpenAI, http: httpx.Client, folder: Path, wanted: dict[tuple[float, float], np.ndarray]
) -> None:
    assert psnr(make(sdk, "wet")[0], wanted[1.0, 0.0]) >= 55, "a file of the folder is loaded when it is named"
    body = {"lora_name": "night", "lora_path": str(folder / "wet"), "defaults": {"num_inference_steps": 3}}
    loaded = http.post(LOAD, json={**body, "color": "blue"})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'night' added successfully.")
    assert loaded.headers["x-omni-ignored-fields"] == "color"
    (card,) = [card for card in http.get("/v1/loras").json()["data"] if card["id"] == "night"]
    assert (card["source"], card["file"], card["defaults"]) == ("loaded", f"wet/{WEIGHTS}", body["defaults"])
    assert make(sdk, "night")[1]["timings"]["computed_steps"] == 3
    again = http.post(LOAD, json=body)
    assert again.status_code == 400
    assert "'night' has already been loaded" in again.json()["error"]["message"]
    other = {"lora_name": "night", "lora_path": "paper.safetensors", "load_inplace": True}
    assert http.post(LOAD, json=other).status_code == 200
    assert psnr(make(sdk, "night", lora=[{"name": "night"}, {"name": "ink", "scale": 0.5}])[0], wanted[0.5, 1.0]) >= 55
    removed = http.post(UNLOAD, json={"lora_name": "night"})
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'night' removed successfully.")
    with pytest.raises(openai.NotFoundError, match="'night' does not exist"):
        make(sdk, "night")
    assert http.post(UNLOAD, json={"lora_name": "night"}).status_code == 404
    listed_name = {"lora_name": "paper", "lora_path": "paper.safetensors"}
    assert [http.post(route, json=listed_name).status_code for route in (LOAD, UNLOAD)] == [200, 200]
    assert "paper" in [card["id"] for card in http.get("/v1/loras").json()["data"]], "it stays listed"


def test_a_broken_file_is_refused_by_name(sdk: openai.OpenAI, http: httpx.Client, folder: Path) -> None:
    before = http.get("/v1/loras").json()
    for name, words in (
        ("huge", "an adapter has at most 4294967296 bytes, got 11811160064"),
        ("nan", "lora_B.weight holds values that are not numbers"),
        ("rank", "rank 4096; ranks of 1 to 1024"),
        ("other", "single_blocks.0.linear1"),
        ("link", "lora_path takes a path within the folders of --lora-dir"),
    ):
        refused = http.post(LOAD, json={"lora_name": "new", "lora_path": f"{name}.safetensors"})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "lora_path")
        assert words in error["message"]
        assert str(folder) not in error["message"], "no client needs to know the folder"
        if name != "link":
            with pytest.raises(openai.BadRequestError, match=words) as failed:
                make(sdk, name)
            assert str(folder) not in str(failed.value)
    assert http.get("/v1/loras").json() == before


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
        with pytest.raises(InvalidRequestError, match=r"the LoRA adapter 'b' does not fit"):
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
