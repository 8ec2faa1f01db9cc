"""Requests with input pictures: their sizes, prices and limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.diffusion.control.builders import INFO, READY, VIDEO, WHOLE
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.inputs.images import InputImage, ReaderSizes, prepare_image


class Halving:
    """An `ImageInput` of a model that sees each picture twice: in full and in half size."""

    min_images, max_images = 1, 2

    def sizes(self, width: int, height: int) -> ReaderSizes:
        return ReaderSizes((width // 2, height // 2), (width, height))

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        return 10 * len(images)

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        height, width = images[-1].reference.shape[:2]
        return height, width


def editing(**settings: object) -> RequestBuilder:
    config = OmniDiffusionConfig("demo", max_pixels=512 * 512, **settings)  # type: ignore[arg-type]
    return RequestBuilder(config, replace(INFO, image_input=Halving()), READY)


def black(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def test_an_edit_is_as_large_as_its_last_picture_and_priced_with_all_of_them() -> None:
    params = OmniDiffusionSamplingParams(true_cfg_scale=2.0, num_outputs_per_prompt=2)
    prompt = OmniPrompt("two words", "bad", images=(black(64, 32), black(48, 80)))
    first, second = editing().build(prompt, params, "r")
    assert (first.request.height, first.request.width) == (80, 48)
    assert [image.condition.shape for image in first.request.images] == [(16, 32, 3), (40, 24, 3)]
    assert first.request.images is second.request.images
    assert first.num_prompt_tokens == 2
    assert first.num_image_tokens == 15
    assert first.num_reference_tokens == 8 + 15
    assert first.cost.branch_tokens == (15 + 23 + 2 + 20, 15 + 23 + 1 + 20)
    assert first.cost.encode == (0.5 * (22 + 21) + 2.0 * 23) / 2  # prompts and pictures are encoded once
    assert first.cost == second.cost
    assert first.cost.decode == 2.0 * 15


def test_the_size_of_an_edit_may_be_given() -> None:
    prompt = OmniPrompt("x", images=(black(64, 32),))
    (request,) = editing().build(prompt, OmniDiffusionSamplingParams(height=96), "r")
    assert (request.request.height, request.request.width) == (96, 64)
    by_server = editing(default_sampling_params={"width": 128})
    (request,) = by_server.build(prompt, OmniDiffusionSamplingParams(), "r")
    assert (request.request.height, request.request.width) == (32, 128)


@pytest.mark.parametrize(
    ("picture", "asked", "served", "size"),
    [
        ((1024, 512), {}, {}, (704, 352)),
        ((512, 512), {}, {}, (512, 512)),
        ((528, 512), {}, {}, (512, 496)),
        ((1024, 512), {"height": 512}, {}, (512, 512)),
        ((1024, 512), {}, {"width": 2048}, (2048, 128)),
        ((1024, 512), {"width": 1024}, {"height": 64}, (1024, 64)),
    ],
)
def test_a_size_that_nobody_asked_for_obeys_the_limit(
    picture: tuple[int, int], asked: dict[str, Any], served: dict[str, int], size: tuple[int, int]
) -> None:
    """Sizes are (width, height). A size that the client did not send is limited without an error."""
    prompt = OmniPrompt("x", images=(black(*picture),))
    (request,) = editing(default_sampling_params=served).build(prompt, OmniDiffusionSamplingParams(**asked), "r")
    assert (request.request.width, request.request.height) == size


def test_a_picture_is_blamed_for_proportions_that_the_limit_leaves_no_room_for() -> None:
    prompt = OmniPrompt("x", images=(black(32000, 16),))
    with pytest.raises(InvalidRequestError, match=r"proportions, as 32000x16 has them.*\(--max-pixels\)") as caught:
        editing().build(prompt, OmniDiffusionSamplingParams(), "r")
    assert caught.value.param == "image"
    (request,) = editing().build(prompt, OmniDiffusionSamplingParams(height=64, width=64), "r")
    assert (request.request.height, request.request.width) == (64, 64)
    with pytest.raises(InvalidRequestError, match="--max-pixels") as caught:
        editing().build(prompt, OmniDiffusionSamplingParams(height=2**20), "r")
    assert caught.value.param == "height"


def test_pictures_that_are_prepared_stay_as_they_are() -> None:
    image = prepare_image(black(32, 32), Halving().sizes)
    (request,) = editing().build(OmniPrompt("x", images=(image,)), OmniDiffusionSamplingParams(), "r")
    assert request.request.images[0] is image


def test_a_prompt_may_be_checked_before() -> None:
    """`check` resizes the picture to the given height and the width that follows from it, as `build` does."""
    whole = replace(WHOLE, image_input=Halving(), pipeline=replace(WHOLE.pipeline, follows_input=True))
    follower = RequestBuilder(OmniDiffusionConfig("demo"), whole, READY)
    prompt, params = OmniPrompt("x", images=(black(64, 32),)), OmniDiffusionSamplingParams(height=96, seed=1)
    checked = follower.check(prompt, params)
    fitted = checked.prompt
    assert [image.reference.shape for image in fitted.images] == [(96, 64, 3)]
    (request,), (expected,) = follower.build_checked(checked, "r"), follower.build(prompt, params, "r")
    assert request.request.images[0] is fitted.images[0]
    assert replace(request, arrival=0.0) == replace(expected, arrival=0.0)
    with pytest.raises(InvalidRequestError, match="--max-pixels"):
        follower.check(prompt, OmniDiffusionSamplingParams(height=2**20))


def test_the_first_and_the_last_picture_of_a_video_are_frames_of_their_own() -> None:
    video = RequestBuilder(OmniDiffusionConfig("demo"), replace(VIDEO, image_input=Halving()), READY)
    prompt = OmniPrompt("x", images=(black(64, 64),) * 2)
    (built,) = video.build(prompt, OmniDiffusionSamplingParams(num_frames=5), "r")
    assert built.request.num_frames == 5
    words = "^image takes 2 pictures with num_frames from 5, got num_frames 1$"
    with pytest.raises(InvalidRequestError, match=words) as caught:
        video.build(prompt, OmniDiffusionSamplingParams(num_frames=1), "r")
    assert caught.value.param == "image"
    video.build(replace(prompt, images=prompt.images[:1]), OmniDiffusionSamplingParams(num_frames=1), "r")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ((), "edits pictures and got none; it takes them as multi_modal_data"),
        ((black(16, 16),) * 3, "at most 2 pictures on this model, got 3"),
        ((3,), "PIL images, got int"),
        ((Image.new("F", (16, 16)),), "modes .* got F"),
    ],
)
def test_pictures_that_are_not_taken(images: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        editing().build(OmniPrompt("x", images=images), OmniDiffusionSamplingParams(), "r")
    assert caught.value.param == "image"


def test_the_size_of_an_edit_may_be_its_adapters(tmp_path: Path) -> None:
    (file := tmp_path / "wide.safetensors").touch()
    server = editing(
        lora_modules={"wide": str(file)},
        lora_defaults={"wide": {"width": 128}},
        default_sampling_params={"width": 32, "height": 32},
    )
    prompt, wide = OmniPrompt("x", images=(black(64, 48),)), LoRARequest("wide")
    for params, size in (
        (OmniDiffusionSamplingParams(lora_request=wide), (32, 128)),
        (OmniDiffusionSamplingParams(lora_request=wide, width=64), (32, 64)),
        (OmniDiffusionSamplingParams(), (32, 32)),
    ):
        (built,) = server.build(prompt, params, "r")
        assert (built.request.height, built.request.width) == size
