"""Rows of jobs: they hold everything that the frames depend on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.diffusion.control.builders import READY, VIDEO
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.jobs import Job
from vllm_omni.video_jobs.job_requests import NewVideo, new_job, params_from_json, params_to_json, stored_prompt
from vllm_omni.video_jobs.records import VideoJob


def builder(**settings: object) -> RequestBuilder:
    return RequestBuilder(OmniDiffusionConfig("video", **settings), VIDEO, READY)  # type: ignore[arg-type]


def row(
    prompt: OmniPrompt, params: OmniDiffusionSamplingParams, requests: RequestBuilder, output_format: str = "mp4"
) -> tuple[VideoJob, Job]:
    checked = requests.check(prompt, params)
    job = Job("r", prompt.prompt, "np", requests.build_checked(checked, "r"))
    return new_job(NewVideo("", "m", prompt, checked, (), output_format), job, "m", 1.0, VIDEO), job


@pytest.mark.parametrize(
    "params",
    [
        OmniDiffusionSamplingParams(),
        OmniDiffusionSamplingParams(seconds=0.5, fps=8, seed=5, guidance_scale=3.0, priority=2, cache=False),
        OmniDiffusionSamplingParams(num_frames=9, sigmas=(1.0, 0.5), height=32, width=48, flow_shift=2.0),
    ],
)
def test_another_server_makes_the_same_request_from_a_row(params: OmniDiffusionSamplingParams) -> None:
    here = builder(default_sampling_params={"negative_prompt": "blurry", "guidance_scale": 7.0})
    elsewhere = builder(default_sampling_params={"num_frames": 5, "height": 128, "negative_prompt": "red"})
    job, made = row(OmniPrompt("a panda"), params, here)
    stored = json.loads(json.dumps(job.request))
    assert stored == job.request
    prompt = OmniPrompt(stored["prompt"], stored["negative_prompt"])
    (again,) = elsewhere.build(prompt, params_from_json(stored["params"]), "r")
    assert again.request == made.requests[0].request
    assert again.priority == job.priority == params.priority


def test_a_row_shows_size_length_and_seed() -> None:
    job, made = row(OmniPrompt("a panda"), OmniDiffusionSamplingParams(seconds=1.0, fps=8), builder())
    assert job.shown == {
        "size": "96x64",
        "seconds": "1",
        "num_frames": 9,
        "fps": 8,
        "seed": made.requests[0].request.seed,
        "num_inference_steps": 4,
    }


def test_an_adapter_is_stored_by_name_and_scale() -> None:
    params = OmniDiffusionSamplingParams(lora_request=LoRARequest("style", "/adapters/style", 0.5))
    stored = json.loads(json.dumps(params_to_json(params)))
    assert stored == {"lora_request": [{"name": "style", "scale": 0.5}]}
    assert params_from_json(stored).lora_request == [LoRARequest("style", None, 0.5)]
    two = [LoRARequest("style", None, 0.5), LoRARequest("ink")]
    assert params_from_json(params_to_json(OmniDiffusionSamplingParams(lora_request=two))).lora_request == two


def test_a_row_has_the_adapters_of_its_servers_defaults_and_no_others(tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("ink", "fast", "own")}
    for file in files.values():
        Path(file).touch()
    modules = {name: files[name] for name in ("ink", "fast")}

    def server(**defaults: object) -> RequestBuilder:
        return builder(lora_modules=modules, default_sampling_params=defaults)

    ink = {"lora_request": {"name": "ink"}, "lora_scale": 0.5}
    fast, own = {"lora_request": [{"name": "fast"}]}, {"lora_request": {"name": "own", "path": files["own"]}}
    none: list[LoRARequest] = []
    for defaults, asked, others, wanted in (
        (ink, None, {}, [("ink", 0.5)]),
        (ink, None, fast, [("ink", 0.5)]),
        (ink, none, fast, []),
        ({}, None, ink, []),
        (ink, LoRARequest("fast"), ink, [("fast", 1.0)]),
        (own, None, own, [("own", 1.0)]),
    ):
        job, made = row(OmniPrompt("a"), OmniDiffusionSamplingParams(lora_request=asked), server(**defaults))
        stored = json.loads(json.dumps(job.request))["params"]
        assert stored["lora_request"] == [{"name": name, "scale": scale} for name, scale in wanted]
        assert "lora_scale" not in stored
        (again,) = server(**others).build(OmniPrompt("a"), params_from_json(stored), "r")
        assert [(lora.name, lora.scale) for lora in again.request.loras] == wanted
        assert again.request.loras == made.requests[0].request.loras


def test_a_row_has_the_recipe_of_its_adapter(tmp_path: Path) -> None:
    (file := tmp_path / "fast.safetensors").touch()

    def server(**recipe: object) -> RequestBuilder:
        return builder(lora_modules={"fast": str(file)}, lora_defaults={"fast": recipe})

    asked = OmniDiffusionSamplingParams(lora_request=LoRARequest("fast"))
    here = server(num_inference_steps=2, guidance_scale=1.0, negative_prompt="bad", num_frames=5)
    job, made = row(OmniPrompt("a"), asked, here)
    first = made.requests[0].request
    assert (first.num_inference_steps, first.num_frames, first.has_guidance) == (2, 5, False)
    stored = json.loads(json.dumps(job.request))
    prompt, params = OmniPrompt(stored["prompt"], stored["negative_prompt"]), params_from_json(stored["params"])
    (again,) = server(num_inference_steps=7, sigmas=(1.0,), negative_prompt="red").build(prompt, params, "r")
    assert again.request == first
    with pytest.raises(InvalidRequestError, match="there is no LoRA adapter 'fast'; served: none"):
        builder().build(prompt, params, "r")


def test_previews_take_a_tenth_of_the_work_at_most() -> None:
    many, _ = row(OmniPrompt("a panda"), OmniDiffusionSamplingParams(num_inference_steps=200), builder())
    few, _ = row(OmniPrompt("a panda"), OmniDiffusionSamplingParams(num_inference_steps=1), builder())
    asked, _ = row(OmniPrompt("a panda"), OmniDiffusionSamplingParams(num_inference_steps=2, num_previews=1), builder())
    assert many.request["params"]["num_previews"] == 3
    assert "num_previews" not in few.request["params"]
    assert asked.request["params"]["num_previews"] == 1


def test_pictures_are_read_from_the_stored_files() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    job, _ = row(OmniPrompt("a panda"), OmniDiffusionSamplingParams(), builder())
    prompt = stored_prompt(job, [file.getvalue()], "a bear")
    assert prompt.prompt == "a bear"
    assert np.array_equal(np.asarray(prompt.images[0]), pixels)


@pytest.mark.parametrize(
    ("output_format", "fps", "param", "words"),
    [
        ("avi", 8, "output_format", "takes mp4, webm, gif"),
        ("gif", 60, "fps", "gif: fps takes a number from 0.01 to 50"),
    ],
)
def test_a_video_that_no_file_can_hold_becomes_no_row(output_format: str, fps: int, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        row(OmniPrompt("a panda"), OmniDiffusionSamplingParams(fps=fps), builder(), output_format)
    assert caught.value.param == param
