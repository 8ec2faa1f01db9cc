"""Pictures of whole pipelines that are no pictures: values that are not numbers, and what a safety checker replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from testbed.runner_driver import Drive, make_request, psnr
from testbed.tiny_diffusers import set_safety_checker
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from tests.diffusion.compute.families.diffusers_fallback.test_pictures import PROMPT, request_of
from vllm_omni import Omni
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.diffusers_fallback.checks import FiniteCheck, is_blocked
from vllm_omni.diffusion.compute.step.schedule import check_schedule, make_schedule, with_one_step_schedules
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.errors import GenerationError, InvalidRequestError, ModerationBlockedError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.inputs.images import InputImage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SD, SKY_REELS, LTX = "StableDiffusionPipeline", "SkyReelsV2Pipeline", "LTXImageToVideoPipeline"
UNKNOWN = ItemError("the model produced values that are not numbers (NaN or infinite)", "not_finite")
BLOCKED = ItemError("the model's safety checker blocked the picture", "blocked")
NAN, INFINITY = float("nan"), float("inf")

CopyOf = Callable[[str], Path]


@pytest.fixture
def copy_of(model_of: ModelOf, tmp_path: Path) -> CopyOf:
    """A copy of the folder of a pipeline class, whose weights may be changed."""
    return lambda name: shutil.copytree(model_of(name), tmp_path / name)


def start(model: Path, **settings: Any) -> ModelRunner:
    runner = ModelRunner(OmniDiffusionConfig(model=str(model), **settings), load_model_info(str(model)))
    runner.start()
    return runner


def change(folder: Path, changed: Callable[[str, torch.Tensor], bool], value: float) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    names = [name for name, weight in weights.items() if changed(name, weight)]
    assert names
    for name in names:
        weights[name].mul_(value) if np.isfinite(value) else weights[name].fill_(value)
    save_file(weights, file, {"format": "pt"})


def video_request(name: str) -> Any:
    fields: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 64}
    pixels = np.full((64, 64, 3), 128, np.uint8)
    images = (InputImage.of(pixels, pixels),) if name == LTX else ()
    return make_request("a", PROMPT, true_cfg_scale=1.0, guidance_scale=1.0, images=images, **fields)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize(
    ("name", "weight"), [("FluxPipeline", "conv_out"), (SKY_REELS, "conv_out"), (LTX, "conv_out.conv")]
)
def test_pixels_that_are_no_numbers_are_no_picture(copy_of: CopyOf, name: str, weight: str, value: float) -> None:
    """A picture and videos; infinite pixels too, which some VAEs clamp."""
    model = copy_of(name)
    change(model / "vae", lambda key, _: key == f"decoder.{weight}.bias", value)
    request = request_of("a", guidance_scale=3.5, max_sequence_length=64) if name == "FluxPipeline" else None
    drive = Drive(start(model)).run({0: [request or video_request(name)]})
    assert (drive.errors, drive.images) == ({"a": UNKNOWN}, {})


def test_float16_that_overflows_says_so(copy_of: CopyOf) -> None:
    model = copy_of("StableDiffusion3Pipeline")
    change(model / "transformer", lambda key, _: key.endswith("ff.net.2.weight"), 1e6)
    request = request_of("a", guidance_scale=1.0, max_sequence_length=64, num_inference_steps=2)
    overflowed = ItemError("float16 overflowed: use bfloat16 (--dtype bfloat16)", "not_finite")
    assert Drive(start(model, dtype="float16")).run({0: [request]}).errors == {"a": overflowed}
    assert not Drive(start(model, dtype="bfloat16")).run({0: [request]}).errors


def test_guidance_that_overflows_is_the_callers_error(model_of: ModelOf) -> None:
    """By the latents of a pipeline, beside a request that goes on."""
    runner = start(model_of("StableDiffusionXLPipeline"))
    wild = request_of("wild", guidance_scale=1e300, true_cfg_scale=1e300)
    good = request_of("good", guidance_scale=5.0)
    wanted = Drive(runner).run({0: [good]}).images["good"]
    drive = Drive(runner).run({0: [good, wild]})
    assert (drive.errors["wild"].kind, drive.errors["wild"].param) == ("invalid", "guidance_scale")
    assert np.array_equal(drive.images["good"], wanted)


class Bare:
    """A pipeline without a processor that turns its own values into bytes."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return (values * 255).round().astype("uint8")


def test_a_pipeline_without_a_processor_is_seen_where_it_rounds() -> None:
    for value, finite in ((0.5, True), (NAN, False)):
        check = FiniteCheck(Bare())
        with check.numpy_errors():
            np.array([NAN]).astype("uint8")  # before the last step, where schedulers compute: no pixels
            check.see_latents(torch.zeros(3))
            Bare()(np.full((2, 2), value))
        assert check.is_finite() == finite
    check.see_latents(torch.tensor([1.0, INFINITY]))
    assert not check.is_finite()


@pytest.mark.parametrize("value", [0.5, NAN])
def test_processors_tell_their_pixels_and_make_the_same_of_them(value: float) -> None:
    """Processors of a copy tell their input, for pictures and for each frame of a video; the pipeline's own do not."""
    processors = {"image_processor": VaeImageProcessor(), "video_processor": VideoProcessor()}
    for name, call, shape in (
        ("image_processor", "postprocess", (1, 3, 4, 4)),
        ("video_processor", "postprocess_video", (1, 3, 2, 4, 4)),
    ):
        copied = SimpleNamespace(**processors)
        check = FiniteCheck(copied)
        pixels = torch.rand(shape)
        pixels.view(-1)[-1] = value
        made = getattr(getattr(copied, name), call)(pixels, output_type="np")
        assert np.array_equal(made, getattr(processors[name], call)(pixels, output_type="np"), equal_nan=True)
        assert check.is_finite() == (value == 0.5)
        fresh = FiniteCheck(SimpleNamespace())
        getattr(processors[name], call)(pixels, output_type="np")
        assert fresh.is_finite()


def test_a_picture_that_the_safety_checker_replaced_is_reported(copy_of: CopyOf) -> None:
    """The start, whose trial picture may be blocked too, is not ended by it."""
    model = copy_of(SD)
    set_safety_checker(model, blocks=True)
    request = request_of("a", guidance_scale=5.0, seed=3)
    drive = Drive(start(model)).run({0: [request]})
    assert (drive.errors, drive.images) == ({"a": BLOCKED}, {})
    set_safety_checker(model, blocks=False)
    drive = Drive(start(model)).run({0: [request]})
    pipeline: Any = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    expected = pipeline(
        PROMPT, generator=generator, guidance_scale=5.0, height=64, width=64, num_inference_steps=4
    ).images[0]
    assert psnr(drive.images["a"], np.array(expected)) >= 60


def test_each_kind_of_output_says_what_was_blocked() -> None:
    class Output:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    for field in ("nsfw_content_detected", "nsfw_detected", "watermark_detected"):
        assert is_blocked(Output(**{field: [True]}))
        assert is_blocked(Output(**{field: [np.bool_(True)]}))
        assert is_blocked(Output(**{field: torch.tensor([True])}))
        assert not is_blocked(Output(**{field: [False]}))
        assert not is_blocked(Output(**{field: None}))
    assert not is_blocked(Output(images=[]))


def test_scripts_get_the_same_errors(copy_of: CopyOf) -> None:
    model = copy_of(SD)
    set_safety_checker(model, blocks=True)
    settings: dict[str, Any] = {"progress_bar": False, "distributed_executor_backend": "uni"}
    with Omni(model=str(model), **settings) as omni, pytest.raises(ModerationBlockedError, match="safety checker"):
        omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=1))
    change(model / "vae", lambda key, _: key == "decoder.conv_out.bias", NAN)
    with Omni(model=str(model), **settings) as omni, pytest.raises(GenerationError, match="that are not numbers"):
        omni.generate(PROMPT, OmniDiffusionSamplingParams(seed=1))


STRETCHED = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9}
TEMPLATES: list[Any] = [
    FlowMatchEulerDiscreteScheduler(**STRETCHED),
    FlowMatchLCMScheduler(**STRETCHED),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", shift_terminal=0.02),
]


@pytest.mark.parametrize("template", TEMPLATES, ids=[type(template).__name__ for template in TEMPLATES])
def test_a_schedule_of_one_step_ends_where_it_would_without_stretching(template: Any) -> None:
    """And one of several steps is diffusers' own."""
    ours = with_one_step_schedules(template)
    assert isinstance(ours, type(template))
    assert (type(ours).__name__, type(ours).__module__) == (type(template).__name__, type(template).__module__)
    assert dict(ours.config) == dict(template.config)
    sigmas = {1: [1.0], 3: [1.0, 0.7, 0.3]}
    for steps, values in sigmas.items():
        arguments: dict[str, Any] = {"num_inference_steps": steps, "mu": 0.6}
        if isinstance(template, FlowMatchEulerDiscreteScheduler):
            arguments["sigmas"] = values
        ours.set_timesteps(**arguments)
        if steps == 1:
            assert ours.sigmas.tolist() == pytest.approx([1.0, 0.0], abs=2e-6)  # UniPC begins just below 1
        else:
            template.set_timesteps(**arguments)
            assert torch.equal(ours.sigmas, template.sigmas)
            assert ours.sigmas[-2].item() == pytest.approx(0.02, abs=1e-6)


def test_a_schedule_that_is_no_numbers_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**STRETCHED)
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(sigmas=[1.0], mu=0.6)
    with pytest.raises(InvalidRequestError, match="num_inference_steps 1 makes a noise schedule") as caught:
        check_schedule(scheduler, make_request("a", num_inference_steps=1))
    assert caught.value.param == "num_inference_steps"
    with pytest.raises(InvalidRequestError, match=r"^sigmas \(1.0,\) makes") as caught:
        check_schedule(scheduler, make_request("a", num_inference_steps=1, sigmas=(1.0,)))
    # Equal to 1 in float32, which the schedule is computed in.
    near = make_request("a", num_inference_steps=1, sigmas=(1 - 1e-12,))
    assert make_schedule(with_one_step_schedules(scheduler), near, 16).sigmas.tolist() == [1.0, 0.0]


@pytest.fixture
def one_step_models(tiny_model: Path, copy_of: CopyOf, tmp_path: Path) -> dict[str, Path]:
    """Qwen-Image img2img, and LTX with the `shift_terminal` of LTX-Video."""
    qwen = shutil.copytree(tiny_model, tmp_path / "img2img")
    for path, key, value in (
        (qwen / "model_index.json", "_class_name", "QwenImageImg2ImgPipeline"),
        (ltx := copy_of(LTX) / "scheduler" / "scheduler_config.json", "shift_terminal", 0.1),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (qwen / "default_sampling_params.json").write_text(json.dumps({"height": 64, "width": 64}))
    return {"qwen": qwen, "ltx": ltx.parent.parent}


def unstretched(model: Path) -> Any:
    """diffusers' pipeline without `shift_terminal`: the oracle for one step, which has nothing to stretch."""
    pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.register_to_config(shift_terminal=None)
    return pipeline


def test_one_step_of_whole_pipelines_is_that_of_the_packed_path(
    one_step_models: dict[str, Path], tiny_model: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image, generator = Image.fromarray(pixels), torch.Generator("cpu")
    images = (InputImage.of(pixels, pixels),)
    request = make_request("a", PROMPT, num_inference_steps=1, images=images, strength=1.0, max_sequence_length=64)
    runner = start(one_step_models["qwen"])
    drive = Drive(runner).run({0: [request]})
    assert not drive.errors
    sizes = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 64}
    expected = unstretched(one_step_models["qwen"])(
        prompt=PROMPT, image=image, strength=1.0, generator=generator.manual_seed(0), **sizes
    ).images[0]
    assert psnr(drive.images["a"], np.array(expected)) >= 60
    packed: Any = start(tiny_model).pipeline
    whole: Any = runner.pipeline
    scheduler = whole.pipeline.scheduler
    scheduler.set_timesteps(sigmas=[1.0], mu=0.5)
    assert scheduler.sigmas.tolist() == make_schedule(packed._scheduler, request, 16).sigmas.tolist() == [1.0, 0.0]

    video = make_request(
        "v", PROMPT, num_inference_steps=1, images=images, num_frames=9, guidance_scale=1.0, max_sequence_length=64
    )
    drive = Drive(start(one_step_models["ltx"])).run({0: [video]})
    assert not drive.errors
    (frames,) = unstretched(one_step_models["ltx"])(
        prompt=PROMPT,
        image=image,
        num_frames=9,
        guidance_scale=1.0,
        generator=generator.manual_seed(0),
        output_type="pil",
        **sizes,
    ).frames
    assert psnr(drive.images["v"], np.stack([np.array(frame) for frame in frames])) >= 60
