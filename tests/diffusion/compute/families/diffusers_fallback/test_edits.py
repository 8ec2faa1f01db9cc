"""Pictures made of pictures: they are diffusers' own, whatever their size; what cannot be edited is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from testbed.runner_driver import Drive, psnr, scheduler_of
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf, PipelineOf, RunnerOf
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

# diffusers' own schedules of Stable Diffusion XL.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SDXL, SD3, KONTEXT = "StableDiffusionXLImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline", "FluxKontextPipeline"
KLEIN = "Flux2KleinPipeline"
PROMPT = "a red apple"
READY = WorkerReady(1.0, 1, "cpu", "float32", 4096, 1e-6, 0.0, 0.5, 2.0)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes for Kontext, which resizes its input to one of a list: its own have a million pixels."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 96), (64, 64), (96, 64)])


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def resolve(model_of: ModelOf, name: str, images: tuple[Image.Image, ...], **params: Any) -> list[ScheduledRequest]:
    model = str(model_of(name))
    builder = RequestBuilder(OmniDiffusionConfig(model), load_model_info(model), READY)
    return builder.build(OmniPrompt(PROMPT, images=images), OmniDiffusionSamplingParams(**params), "r")


def built(model_of: ModelOf, name: str, images: tuple[Image.Image, ...], **params: Any) -> list[DiffusionRequest]:
    """Requests for a worker."""
    return [scheduled.request for scheduled in resolve(model_of, name, images, **params)]


def drawn(pipeline: Any, seed: int, **arguments: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.array(pipeline(prompt=PROMPT, generator=generator, num_inference_steps=4, **arguments).images[0])


T5: dict[str, Any] = {"max_sequence_length": 64}
SQUARE = {"height": 64, "width": 64}
CASES: list[tuple[str, tuple[int, int], dict[str, Any], dict[str, Any]]] = [
    # The size of the input picture, what is asked of us, what of diffusers beyond it and `strength`.
    (SDXL, (96, 64), {}, {}),
    (SDXL, (99, 70), {"strength": 0.8}, {}),  # rounded down to 96x64, as diffusers does
    (SDXL, (64, 64), {"strength": 1.0, "guidance_scale": 3.0}, {"guidance_scale": 3.0}),
    (SD3, (64, 64), {"strength": 0.1, **T5}, {**SQUARE, **T5}),  # less than a step is one, here
    (SD3, (64, 64), {"strength": 0.5, "flow_shift": 8.0, **T5}, {**SQUARE, **T5}),
    (SD3, (96, 64), {**SQUARE, **T5}, {**SQUARE, **T5}),  # diffusers brings the picture to the size, too
    (KONTEXT, (96, 64), {**SQUARE, **T5}, {**SQUARE, **T5, "max_area": 64 * 64}),
    (KONTEXT, (64, 96), {**T5}, {"height": 80, "width": 48, **T5, "max_area": 80 * 48}),
]


@pytest.mark.parametrize(("name", "size", "params", "arguments"), CASES)
def test_an_edit_is_diffusers_own(
    model_of: ModelOf,
    runner_of: RunnerOf,
    pipeline_of: PipelineOf,
    name: str,
    size: tuple[int, int],
    params: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    image = noise(*size)
    (request,) = built(model_of, name, (image,), seed=3, **params)
    drive = Drive(runner_of(name)).run({0: [request]})
    assert not drive.errors
    strength = {"strength": params["strength"]} if "strength" in params else {}
    with scheduler_of(pipeline_of(name), request):
        expected = drawn(pipeline_of(name), 3, image=image, **strength, **arguments)
    assert psnr(drive.images["r-0"], expected) >= 60
    other = drawn(pipeline_of(name), 3, image=noise(*size, seed=1), **strength, **arguments)
    assert psnr(other, expected) < 60  # the picture matters


def test_several_pictures_are_seen_in_their_order(
    model_of: ModelOf, runner_of: RunnerOf, pipeline_of: PipelineOf
) -> None:
    """Two requests under way: of two pictures of other sizes, and of none."""
    images = (noise(96, 64, 1), Image.new("RGB", (64, 80)))
    (both,) = built(model_of, KLEIN, images, seed=3, **SQUARE, **T5)
    (none,) = built(model_of, KLEIN, (), seed=4, **T5)
    drive = Drive(runner_of(KLEIN)).run({0: [both], 1: [replace(none, request_id="none")]})
    assert not drive.errors
    pipeline = pipeline_of(KLEIN)
    expected = drawn(pipeline, 3, image=list(images), **SQUARE, **T5)
    assert psnr(drive.images["r-0"], expected) >= 60
    assert psnr(drawn(pipeline, 3, image=list(reversed(images)), **SQUARE, **T5), expected) < 60
    assert psnr(drive.images["none"], drawn(pipeline, 4, **SQUARE, **T5)) >= 60


def test_a_size_that_the_pipeline_cannot_be_told_is_that_of_its_picture(
    model_of: ModelOf, runner_of: RunnerOf, pipeline_of: PipelineOf
) -> None:
    image = noise(96, 80)
    (request,) = built(model_of, SDXL, (image,), seed=3, height=64, width=72)
    drive = Drive(runner_of(SDXL)).run({0: [request]})
    resized = image.resize((72, 64), Image.Resampling.LANCZOS)
    assert psnr(drive.images["r-0"], drawn(pipeline_of(SDXL), 3, image=resized)) >= 60


def test_without_a_picture_kontext_makes_one_from_text(
    model_of: ModelOf, runner_of: RunnerOf, pipeline_of: PipelineOf
) -> None:
    (request,) = built(model_of, KONTEXT, (), seed=3, **T5)
    drive = Drive(runner_of(KONTEXT)).run({0: [request]})
    expected = drawn(pipeline_of(KONTEXT), 3, max_area=64 * 64, **SQUARE, **T5)
    assert psnr(drive.images["r-0"], expected) >= 60


@pytest.mark.parametrize("name", [SDXL, SD3, KONTEXT])
def test_edits_under_way_do_not_touch_one_another(
    model_of: ModelOf, runner_of: RunnerOf, pipeline_of: PipelineOf, name: str
) -> None:
    """Requests with different pictures and strengths: one begins between two steps of another; a third is aborted."""
    images = [noise(64, 64, seed) for seed in range(3)]
    own = {} if name == SDXL else T5
    strengths: list[dict[str, Any]] = [{}] * 3 if name == KONTEXT else [{"strength": s} for s in (0.9, 0.5, 0.7)]
    requests = []
    for index, image in enumerate(images):
        (request,) = built(model_of, name, (image,), seed=index, **own, **strengths[index])
        requests.append(request)
    runner = runner_of(name)
    ids = ["a", "b", "c"]
    requests = [replace(request, request_id=name) for request, name in zip(requests, ids, strict=True)]
    runner.execute(StepPlan(0, new_requests=[requests[2]], encode=["c"]))
    runner.execute(StepPlan(1, denoise=["c"]))
    runner.abort(["c"])
    drive = Drive(runner).run({0: [requests[0]], 1: [requests[1]]})
    runner.execute(StepPlan(9, release=["c"]))
    assert not drive.errors
    sizes = {} if name == SDXL else {**SQUARE, **T5}
    for index, request_id in enumerate(ids[:2]):
        arguments = {**sizes, **strengths[index], **({"max_area": 64 * 64} if name == KONTEXT else {})}
        expected = drawn(pipeline_of(name), index, image=images[index], **arguments)
        assert psnr(drive.images[request_id], expected) >= 60


def test_a_strength_of_no_step_is_the_callers_mistake(model_of: ModelOf, runner_of: RunnerOf) -> None:
    (request,) = built(model_of, SDXL, (noise(64, 64),), strength=0.2)
    errors = Drive(runner_of(SDXL)).run({0: [request]}).errors
    expected = ItemError("strength 0.2 of 4 steps leaves no step", "invalid", traceback="", param="strength")
    assert errors["r-0"] == expected


@pytest.mark.parametrize(
    ("name", "num_images", "params", "param", "words"),
    [
        (SDXL, 1, {"strength": 1.5}, "strength", "a number above 0 and at most 1"),
        (SDXL, 1, {"strength": -0.1}, "strength", "a number above 0 and at most 1"),
        (SD3, 1, {"strength": 0}, "strength", "at 0 no step is left"),
        (SDXL, 0, {}, "image", "edits pictures and got none"),
        (SDXL, 2, {}, "image", "at most 1 pictures"),
        (KLEIN, 5, {}, "image", "at most 4 pictures"),
        (KONTEXT, 1, {"strength": 0.5}, "strength", "no such parameter"),
        (KONTEXT, 2, {}, "image", "at most 1 pictures"),
        (SDXL, 1, {"height": 60}, "height", "multiples of 8"),
        (SDXL, 1, {"num_frames": 5}, "num_frames", "single pictures"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(
    model_of: ModelOf, name: str, num_images: int, params: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        resolve(model_of, name, (noise(64, 64),) * num_images, **params)
    assert caught.value.param == param


def test_a_picture_that_would_make_too_large_a_one_makes_the_largest_of_its_proportions(model_of: ModelOf) -> None:
    (request,) = resolve(model_of, SDXL, (Image.new("RGB", (2048, 1024)),))
    assert (request.request.width, request.request.height) == (1440, 720)
    assert request.request.images[0].reference.shape == (720, 1440, 3)
    (request,) = resolve(model_of, SDXL, (Image.new("RGB", (2048, 1024)),), height=64, width=128)
    assert request.request.images[0].reference.shape == (64, 128, 3)  # nothing larger waits in the queue


def test_positions_bound_the_sides(model_of: ModelOf, runner_of: RunnerOf) -> None:
    """The model has 32 rows and columns of 16 pixels. The longest picture that is accepted is made."""
    with pytest.raises(InvalidRequestError, match=r"1024x64: sides may have up to 512 pixels .* is 512x64") as caught:
        resolve(model_of, SD3, (noise(64, 64),), height=64, width=1024, **T5)
    assert caught.value.param == "width"
    (request,) = resolve(model_of, SD3, (noise(1024, 64),), strength=0.5, **T5)
    assert (request.request.width, request.request.height) == (512, 32)
    drive = Drive(runner_of(SD3)).run({0: [request.request]})
    assert not drive.errors
    assert drive.images["r-0"].shape == (32, 512, 3)


def test_a_picture_that_is_changed_costs_its_share_of_the_steps_and_no_tokens(model_of: ModelOf) -> None:
    """One to look at is part of the sequence."""
    image = noise(64, 64)
    (half,), (all_steps,) = (resolve(model_of, SDXL, (image,), strength=s, guidance_scale=1.0) for s in (0.5, 1.0))
    num_tokens = half.num_image_tokens + half.num_prompt_tokens
    assert half.cost.branch_tokens == (num_tokens,)
    assert half.cost.step == all_steps.cost.step / 2
    assert half.num_reference_tokens == half.num_image_tokens
    (seen,) = resolve(model_of, KONTEXT, (image,))
    assert seen.cost.branch_tokens == (2 * 16 + seen.num_prompt_tokens,)


@pytest.mark.parametrize(("name", "scale"), [(SDXL, 3.0), (SDXL, 1.0), (KONTEXT, 3.0)])
def test_a_worker_counts_the_tokens_that_a_request_was_priced_for(
    model_of: ModelOf, runner_of: RunnerOf, name: str, scale: float
) -> None:
    limits = T5 if name == KONTEXT else {"strength": 1.0}
    (scheduled,) = resolve(model_of, name, (noise(64, 64),), guidance_scale=scale, num_inference_steps=2, **limits)
    runner = runner_of(name)
    runner.execute(StepPlan(0, new_requests=[scheduled.request], encode=["r-0"]))
    result = runner.execute(StepPlan(1, denoise=["r-0"]))
    runner.execute(StepPlan(2, release=["r-0"]))
    assert (result.num_tokens, result.num_sequences) == (
        scheduled.cost.tokens_per_step,
        len(scheduled.cost.branch_tokens),
    )


def test_a_large_picture_to_look_at_is_kept_smaller_and_priced_as_one_of_the_models_size(model_of: ModelOf) -> None:
    (request,) = resolve(model_of, KONTEXT, (Image.new("RGB", (4096, 2048)),))
    assert request.request.images[0].reference.shape == (1448, 2896, 3)
    assert (request.request.height, request.request.width) == (48, 96)
    assert request.num_reference_tokens == 16
