"""Lengths of videos: in frames or seconds, checked, priced, and carried to the workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from testbed.fakes import as_whole, make_config
from tests.diffusion.control.builders import INFO, READY, VIDEO
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.catalog.whole_info import WholePipeline
from vllm_omni.diffusion.control.default_checks import check_defaults
from vllm_omni.diffusion.control.frames import FrameLimits
from vllm_omni.diffusion.control.request_builder import RequestBuilder
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError, InvalidRequestError, QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

LIMITS = FrameLimits(4, 83)
WHOLE_VIDEO = as_whole(
    VIDEO,
    WholePipeline("SomePipeline", ("num_inference_steps", "num_frames", "fps", "guidance_scale"), "callback", 1),
    guidance=Guidance("guidance_scale", needs_negative_prompt=False),
    default_fps=None,
    default_sampling_params={**VIDEO.default_sampling_params, "fps": 8},
)


def built(params: dict[str, Any], info: Any = VIDEO, **settings: Any) -> ScheduledRequest:
    config = OmniDiffusionConfig("model", **{"max_num_frames": 81, **settings})
    (request,) = RequestBuilder(config, info, READY).build(
        OmniPrompt("a b"), OmniDiffusionSamplingParams(**params), "r"
    )
    return request


@pytest.mark.parametrize("num_frames", range(-9, 100))
def test_every_number_of_frames_is_valid_or_told_its_neighbours(num_frames: int) -> None:
    valid = range(1, 84, 4)
    if num_frames in valid:
        LIMITS.check(num_frames)
        return
    with pytest.raises(InvalidRequestError, match=f"^num_frames {num_frames} is ") as caught:
        LIMITS.check(num_frames)
    assert caught.value.param == "num_frames"
    advised = valid[1:] if num_frames > 1 else valid  # more than one frame: a video is wanted
    nearest = min(advised, key=lambda n: abs(n - num_frames))
    assert f"the nearest valid number is {nearest}" in str(caught.value)
    if advised[0] < num_frames < valid[-1]:
        below, above = (num_frames - 1) // 4 * 4 + 1, (num_frames - 1) // 4 * 4 + 5
        assert str(caught.value).endswith(f"(valid below and above: {below} and {above})")


@pytest.mark.parametrize(
    ("params", "num_frames", "fps"),
    [
        ({}, 17, 16),
        ({"num_frames": 81}, 81, 16),
        ({"num_frames": 1}, 1, 16),
        ({"seconds": 5}, 81, 16),
        ({"seconds": 2.0, "fps": 24}, 49, 24),
        ({"seconds": 0.0}, 1, 16),
        ({"seconds": 1.067, "fps": 15}, 17, 15),
        ({"seconds": 1.0, "num_frames": 17}, 17, 16),
    ],
)
def test_a_length_in_frames_or_seconds(params: dict[str, Any], num_frames: int, fps: int) -> None:
    request = built(params).request
    assert (request.num_frames, request.fps) == (num_frames, fps)


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"seconds": 5.1}, "seconds", r"^seconds 5.1 at 16 .* the nearest valid value is 5 \(81 frames\)$"),
        ({"seconds": 1, "fps": 30}, "seconds", r"multiple of 4; the nearest valid value is 0.933333 \(29 frames\)$"),
        ({"seconds": 60}, "seconds", r"up to 81 \(--max-num-frames\); the nearest valid value is 5 \(81 frames\)$"),
        ({"seconds": 0.01}, "seconds", r"the nearest valid value is 0.25 \(5 frames\)$"),
        ({"seconds": 1e6}, "seconds", "^seconds 1000000 at 16 frames"),
        ({"num_frames": 2}, "num_frames", "the nearest valid number is 5$"),
        ({"seconds": 1e300}, "seconds", r"up to 81 \(--max-num-frames\)"),
        ({"seconds": -1}, "seconds", "a number of at least 0"),
        ({"seconds": float("inf")}, "seconds", "a number of at least 0"),
        ({"seconds": "4"}, "seconds", "takes a number, got '4'"),
        ({"seconds": 1.0, "num_frames": 21}, "num_frames", "seconds 1, which are 17 frames at 16 a second, differ"),
        ({"num_frames": 10**18}, "num_frames", "more than 81"),
        ({"num_frames": 16.5}, "num_frames", "an integer"),
        ({"fps": 0}, "fps", "1 to 1000"),
        ({"height": 72}, "height", "the nearest valid size is 96x80"),
        ({"flow_shift": 0.0}, "flow_shift", "from 0.01 to 100, got 0"),
        ({"flow_shift": 1e-20}, "flow_shift", "from 0.01 to 100, got 1e-20"),
        ({"flow_shift": 101.0}, "flow_shift", "from 0.01 to 100, got 101"),
        ({"guidance_scale_2": -1.0}, "guidance_scale_2", "0 to 100"),
        ({"strength": 0.5}, "strength", "it takes guidance_scale, guidance_scale_2, .*, num_frames, seconds, fps$"),
    ],
)
def test_a_wrong_length_is_named(params: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        built(params)
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_a_server_of_pictures_alone_advises_one_frame() -> None:
    for params in ({"seconds": 2}, {"num_frames": 2}):
        with pytest.raises(InvalidRequestError, match=r"is 0 \(1 frame\)$|number is 1$"):
            built(params, max_num_frames=1, default_sampling_params={"num_frames": 1})


def test_the_nearest_value_of_a_refusal_is_accepted() -> None:
    for fps in (7, 12, 24, 30, 1000):
        for seconds in (0.01, 0.3, 1.1, 2.77):
            try:
                built({"seconds": seconds, "fps": fps})
            except InvalidRequestError as error:
                advised = float(str(error).split("value is ")[1].split()[0])
                built({"seconds": advised, "fps": fps})


def test_a_length_of_the_request_comes_before_one_of_the_server() -> None:
    served = {"default_sampling_params": {"seconds": 2.0}}
    assert built({}, **served).request.num_frames == 33
    assert built({"fps": 8}, **served).request.num_frames == 17
    assert built({"num_frames": 9}, **served).request.num_frames == 9
    assert built({"seconds": 1}, default_sampling_params={"num_frames": 33, "fps": 8}).request.num_frames == 9


def test_the_default_limit_is_the_models_own_length() -> None:
    assert built({}, max_num_frames=None).request.num_frames == 17
    with pytest.raises(InvalidRequestError, match=r"num_frames 21 is more than 17 \(--max-num-frames\)"):
        built({"num_frames": 21}, max_num_frames=None)
    for settings, line in (
        ({"max_num_frames": 9}, "--max-num-frames 9 refuses the model's own default: num_frames 17 is more than 9"),
        ({"default_sampling_params": {"seconds": 9.0}}, "--default-sampling-params: seconds 9 at 16 frames a second"),
        ({"default_sampling_params": {"seconds": 1.0, "num_frames": 9}}, "--default-sampling-params: num_frames 9 and"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_defaults(OmniDiffusionConfig("model", **settings), VIDEO)
        assert str(caught.value).startswith(line)


def test_whole_pipelines_take_the_same_lengths() -> None:
    request = built({"seconds": 1}, WHOLE_VIDEO).request
    assert (request.num_frames, request.fps) == (9, 8)
    with pytest.raises(InvalidRequestError, match=r"num_frames 10 is not 1 more than a multiple of 4; .* is 9"):
        built({"num_frames": 10}, WHOLE_VIDEO)
    parameters = tuple(name for name in WHOLE_VIDEO.pipeline.parameters if name != "fps")
    untold = replace(WHOLE_VIDEO, pipeline=replace(WHOLE_VIDEO.pipeline, parameters=parameters))
    with pytest.raises(InvalidRequestError, match=r"^seconds 1\.0: this model has no such parameter"):
        built({"seconds": 1}, untold)


def test_a_picture_model_takes_no_length() -> None:
    for name, value in (("seconds", 1.0), ("fps", 8), ("guidance_scale_2", 3.0)):
        with pytest.raises(InvalidRequestError, match=f"^{name} {value}: this model has no such parameter") as caught:
            built({name: value}, INFO)
        assert caught.value.param == name
    assert built({"guidance_scale_2": 1.0}, INFO).request.guidance_scale_2 is None, "scripts give it to every model"


def test_parameters_of_two_transformers_and_of_the_schedule_reach_the_workers() -> None:
    request = built({"guidance_scale": 4.0, "guidance_scale_2": 3.0, "flow_shift": 5.0}).request
    assert (request.true_cfg_scale, request.guidance_scale_2, request.flow_shift) == (4.0, 3.0, 5.0)
    request = built({}).request
    assert (request.true_cfg_scale, request.guidance_scale_2, request.flow_shift) == (5.0, None, None)
    assert request.has_guidance
    assert request.negative_prompt == ""


def test_prices_of_a_video() -> None:
    """24 tokens a latent frame; 5 latent frames become 17 frames. Text is attended to and is no part of a sequence."""
    video, picture = built({}), built({"num_frames": 1})
    assert video.num_image_tokens == 5 * 24
    assert video.cost.branch_tokens == (120, 120)
    assert video.cost.step == pytest.approx(2 * 120 * (1 + (120 + 20) / 100))
    assert video.cost.encode == 0.5 * 2 * 20, "with padding"
    assert video.cost.decode == 2.0 * 17 * 24
    assert picture.cost.branch_tokens == (24, 24)
    assert picture.cost.decode == 2.0 * 24
    assert [VIDEO.latent_frames(n) for n in (1, 5, 17, 81)] == [1, 2, 5, 21]


def test_the_price_of_a_video_decides_about_its_admission() -> None:
    video, picture = built({}), replace(built({"num_frames": 1}), request=replace(built({}).request, request_id="p"))
    seconds = READY.seconds_per_unit * video.cost.total(video.num_steps)
    scheduler = Scheduler(make_config(max_queue_seconds=0.9 * seconds), READY)
    scheduler.add([picture])
    with pytest.raises(QueueFullError):
        scheduler.add([video])
    scheduler = Scheduler(make_config(max_queue_seconds=2.0 * seconds), READY)
    scheduler.add([picture])
    before = scheduler.queue_seconds
    scheduler.add([video])
    assert scheduler.queue_seconds - before == pytest.approx(seconds, rel=0.01)
