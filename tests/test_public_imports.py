"""Scripts of the public vllm-omni package 0.30: what they import and read is here, or one line says what to use."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from testbed.fakes import FakeExecutor, fake_image, make_request
from testbed.tiny_models import photo
from vllm_omni.diffusion.utils.image_output import extract_images_from_outputs
from vllm_omni.diffusion.utils.param_utils import apply_declared_extra_args
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.entrypoints.openai.stage_params import clone_sampling_params
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt, parse_prompt
from vllm_omni.model_extras import (
    build_image_to_image_prompt,
    build_text_to_image_prompt,
    get_ar_input_builder,
    get_ar_tokenizer_validator,
    get_extra_body_params,
    get_model_class_name,
    should_init_extra_args_for_non_diffusion_stages,
)
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.platforms import current_omni_platform

PARAMS = OmniDiffusionSamplingParams(height=32, width=48, num_inference_steps=2, seed=142)
PICTURE = Image.new("RGB", (3, 3))


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with patch("vllm_omni.omni.make_executor", lambda config, info: FakeExecutor()):
        yield


def run_script(omni: Omni, params: OmniDiffusionSamplingParams, prompt: dict[str, Any]) -> list[Image.Image]:
    """The calls of the public image examples around `generate`, less the line that changes `extra_args`."""
    name: str | None = get_model_class_name(omni)  # type: ignore[func-returns-value]
    apply_declared_extra_args(params, get_extra_body_params(name), {"cfg_scale": 4.0, "use_norm": False})
    stages = [clone_sampling_params(stage) for stage in omni.default_sampling_params_list]
    assert [isinstance(stage, OmniDiffusionSamplingParams) for stage in stages] == [True]
    assert not should_init_extra_args_for_non_diffusion_stages(name)
    stages_before: list[Callable[[str | None], object]] = [get_ar_input_builder, get_ar_tokenizer_validator]
    assert [find(name) for find in stages_before] == [None, None]
    return extract_images_from_outputs(omni.generate(prompt, sampling_params_list=[params]))


def test_the_script_of_text_to_image() -> None:
    parser = argparse.ArgumentParser()
    current_omni_platform.pre_register_and_update(parser)
    assert vars(parser.parse_args([])) == {}
    with Omni("demo", progress_bar=False) as omni:
        prompt = {"prompt": "a cup", "modalities": ["image"], "negative_prompt": ""}
        prompt = build_text_to_image_prompt(model_class_name=None, prompt=prompt, height=32, width=48)
        (image,) = run_script(omni, PARAMS, prompt)
    assert np.array_equal(np.asarray(image), fake_image(make_request(size=(32, 48), seed=142)))


@pytest.mark.parametrize("input_image", [photo(64, 64, 1), [photo(64, 64, 1)]])
def test_the_script_of_image_to_image(input_image: Any, tiny_edit_model: Path) -> None:
    with Omni(tiny_edit_model, progress_bar=False) as omni:
        prompt = build_image_to_image_prompt(
            model_class_name=None, prompt="at night", negative_prompt="", input_image=input_image, height=32, width=48
        )
        (image,) = run_script(omni, PARAMS, prompt)
    assert np.array_equal(np.asarray(image), fake_image(make_request(size=(32, 48), seed=142)))


def test_pictures_are_those_of_the_first_output_that_has_some() -> None:
    empty, full = OmniRequestOutput("a", "a"), OmniRequestOutput("b", "b", images=[PICTURE])
    assert extract_images_from_outputs([empty, full]) == extract_images_from_outputs(full) == [PICTURE]
    assert extract_images_from_outputs([empty]) == extract_images_from_outputs(None) == []


def test_declared_parameters_are_refused() -> None:
    apply_declared_extra_args(PARAMS, {"shift"}, {"shift": None, "other": 1})
    with pytest.raises(InvalidRequestError, match=r"^shift: parameters have fields of their own here") as caught:
        apply_declared_extra_args(PARAMS, {"shift"}, {"shift": 3.0})
    assert caught.value.param == "shift"


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("vllm_omni.model_extras", "get_video_generation_defaults", "models have no extras here: give a prompt"),
        ("vllm_omni.entrypoints.openai.stage_params", "build_stage_sampling_params_list", "a model has one stage here"),
        ("vllm_omni.diffusion.utils.param_utils", "merge", "parameters have fields of their own here"),
        ("vllm_omni.diffusion.utils.image_output", "save_images", "the pictures of an output are output.images"),
        ("vllm_omni.inputs.data", "OmniTextPrompt", "a prompt is a string or a mapping"),
        ("vllm_omni.inputs.data", "OmniSamplingParams", "here OmniDiffusionSamplingParams"),
    ],
)
def test_names_that_are_not_here_name_ours(module: str, name: str, message: str) -> None:
    with pytest.raises(ImportError, match=f"^{module} has no {name}: {message}"):
        exec(f"from {module} import {name}")
    with pytest.raises(AttributeError, match="has no attribute '__path__'"):
        import_module(module).__path__  # noqa: B018


def test_other_names_are_pythons_own_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'OmniPromt'"):
        exec("from vllm_omni.inputs.data import OmniPromt")


def test_attributes_that_are_not_here_name_ours() -> None:
    with Omni("demo", progress_bar=False) as omni:
        reads: list[tuple[Callable[[], Any], str]] = [
            (lambda: PARAMS.extra_args, "extra_args: parameters have fields of their own here"),  # type: ignore[attr-defined]
            (lambda: PARAMS.guidance_rescale, "guidance_rescale: guidance is not rescaled"),  # type: ignore[attr-defined]
            (lambda: PARAMS.nothing, "'OmniDiffusionSamplingParams' object has no attribute 'nothing'"),  # type: ignore[attr-defined]
        ]
        for owner in (omni, AsyncOmni("demo")):
            for name, message in (
                ("start_profile", "start_profile: no profiler is started by requests"),
                ("shutdown", "shutdown: here close()"),
                ("nothing", f"'{type(owner).__name__}' object has no attribute 'nothing'"),
            ):
                reads.append((partial(getattr, owner, name), message))
        for read, message in reads:
            with pytest.raises(AttributeError) as caught:
                read()
            assert str(caught.value).startswith(message)
    assert getattr(PARAMS, "extra_args", None) is None


def test_parameters_say_how_to_change_them() -> None:
    with pytest.raises(FrozenInstanceError, match=r"make another one with dataclasses.replace\(..., seed=...\)"):
        PARAMS.seed = 8  # type: ignore[misc]
    assert replace(PARAMS, seed=8).seed == 8


@pytest.mark.parametrize("modalities", [None, "image", ["image"], ("image",), []])
def test_a_prompt_may_ask_for_images(modalities: Any) -> None:
    assert parse_prompt({"prompt": "a", "modalities": modalities}) == OmniPrompt("a")


@pytest.mark.parametrize("modalities", ["text", ["image", "text"], ["audio"], {"image"}, 3, [np.zeros(2)]])
def test_a_prompt_may_ask_for_nothing_else(modalities: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r'^modalities takes \["image"\], or leave it out') as caught:
        parse_prompt({"prompt": "a", "modalities": modalities})
    assert caught.value.param == "modalities"


@pytest.mark.parametrize("images", [PICTURE, [PICTURE], (PICTURE,), iter([PICTURE]), map(Image.Image.copy, [PICTURE])])
def test_one_picture_is_a_list_of_one(images: Any) -> None:
    for prompt in (
        OmniPrompt("a", images=images),
        parse_prompt({"prompt": "a", "multi_modal_data": {"image": PICTURE}}),
    ):
        assert [image.size for image in prompt.images] == [(3, 3)]
    array = np.zeros((3, 3, 3), np.uint8)
    assert OmniPrompt("a", images=array).images[0] is array  # type: ignore[arg-type]
    assert OmniPrompt("a", images=None).images == ()  # type: ignore[arg-type]


@pytest.mark.parametrize("image", ["a.png", b"png", bytearray(b"png"), Path("a.png")])
def test_a_path_in_place_of_a_picture_is_told_to_be_opened(image: Any) -> None:
    for images in (image, [image], (PICTURE, image)):
        makes: list[Callable[[], OmniPrompt]] = [
            partial(OmniPrompt, "a", images=images),  # type: ignore[arg-type]
            partial(parse_prompt, {"prompt": "a", "multi_modal_data": {"image": images}}),
        ]
        for make in makes:
            with pytest.raises(InvalidRequestError, match=r"^image takes PIL images: open it first, with ") as caught:
                make()
            assert caught.value.param == "image"
