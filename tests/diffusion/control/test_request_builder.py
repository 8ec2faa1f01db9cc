"""RequestBuilder: what is wrong is refused with the field's name; what is right is priced and seeded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.diffusion.control.builders import INFO, READY, WHOLE, builder
from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.diffusion.control.default_checks import check_default_prompt, check_defaults
from vllm_omni.diffusion.control.request_builder import RequestBuilder, spread_previews
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt, parse_prompt

"""A pipeline of diffusers that has few parameters."""


def test_defaults_of_the_model_are_filled_and_overridden_by_the_server() -> None:
    (request,) = builder().build(OmniPrompt("a cat"), OmniDiffusionSamplingParams(seed=7), "r")
    assert (request.request_id, request.request.height, request.request.width, request.request.num_inference_steps) == (
        "r-0",
        64,
        96,
        20,
    )
    assert request.request.seed == 7
    assert not request.request.has_guidance  # as in diffusers: no negative prompt, no guidance
    served = builder(default_sampling_params={"num_inference_steps": 5, "negative_prompt": "bad"})
    (request,) = served.build(OmniPrompt("a cat"), OmniDiffusionSamplingParams(), "r")
    assert request.request.num_inference_steps == 5
    assert request.request.negative_prompt == "bad"
    assert request.request.has_guidance


@pytest.mark.parametrize(("own_side", "longest"), [(64, 1024), (1024, 2048)])
def test_without_a_limit_the_model_sets_one(own_side: int, longest: int) -> None:
    """Steps cannot be interrupted, so without a default limit a huge picture would block all others for minutes."""
    defaults = {"height": own_side, "width": own_side, "num_inference_steps": 2}
    info = replace(INFO, default_sampling_params=defaults)
    largest = OmniDiffusionSamplingParams(height=longest, width=longest)
    for config in (OmniDiffusionConfig("demo"), OmniDiffusionConfig("demo", default_sampling_params={"height": 32})):
        unlimited = RequestBuilder(config, info, READY)
        assert unlimited.build(OmniPrompt("x"), largest, "r")[0].request.height == longest
        with pytest.raises(InvalidRequestError, match=f"at most {longest**2} are accepted") as caught:
            unlimited.build(OmniPrompt("x"), replace(largest, width=longest + 16), "r")
        assert caught.value.param == "width"


def test_cost_counts_both_branches() -> None:
    params = OmniDiffusionSamplingParams(height=64, width=64)
    (request,) = builder().build(OmniPrompt("a b c d", "e f"), params, "r")
    # 16 image tokens; 4 and 2 text tokens; n (1 + n / 100) a branch
    assert request.cost.tokens_per_step == 20 + 18
    assert request.cost.step == pytest.approx(20 * 1.2 + 18 * 1.18)
    assert request.cost.encode == pytest.approx(3.0)
    assert request.cost.decode == pytest.approx(32.0)


GUIDED_BY_GUIDANCE_SCALE = replace(
    INFO,
    guidance=Guidance("guidance_scale", 1.0, "", ("cfg_normalization", "cfg_truncation")),
    token_multiple=32,
    default_sampling_params={"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 0.0},
)


def test_a_family_may_count_guidance_from_zero_and_know_a_negative_prompt() -> None:
    other = RequestBuilder(OmniDiffusionConfig("demo"), GUIDED_BY_GUIDANCE_SCALE, READY)
    (request,) = other.build(OmniPrompt("a b", "ignored"), OmniDiffusionSamplingParams(), "r")
    assert not request.request.has_guidance
    params = OmniDiffusionSamplingParams(guidance_scale=0.5, cfg_normalization=True, cfg_truncation=0.75)
    (request,) = other.build(OmniPrompt("a b"), params, "r")
    assert request.request.has_guidance
    assert (request.request.true_cfg_scale, request.request.negative_prompt) == (1.5, "")
    assert (request.request.cfg_normalization, request.request.cfg_truncation) == (1.0, 0.75)
    # 16 image tokens, and 2 or no text tokens, each filled up to a multiple of 32
    assert request.cost.branch_tokens == (64, 32)


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"true_cfg_scale": 4.0}, "true_cfg_scale", "takes guidance_scale, cfg_normalization, cfg_truncation"),
        ({"guidance_scale": -1.0}, "guidance_scale", "0 to 100"),
        ({"cfg_normalization": float("inf")}, "cfg_normalization", "0 to 100"),
        ({"cfg_truncation": 1.5}, "cfg_truncation", "0 to 1"),
    ],
)
def test_wrong_parameters_of_such_a_family_are_named(params: dict[str, Any], param: str, words: str) -> None:
    other = RequestBuilder(OmniDiffusionConfig("demo"), GUIDED_BY_GUIDANCE_SCALE, READY)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        other.build(OmniPrompt("x"), OmniDiffusionSamplingParams(**params), "r")
    assert caught.value.param == param


def test_outputs_have_consecutive_seeds_and_a_missing_seed_is_drawn_once() -> None:
    requests = builder().build(OmniPrompt("x"), OmniDiffusionSamplingParams(num_outputs_per_prompt=3), "r")
    assert [r.request_id for r in requests] == ["r-0", "r-1", "r-2"]
    first = requests[0].request.seed
    assert [r.request.seed for r in requests] == [first, first + 1, first + 2]


@pytest.mark.parametrize(
    ("params", "param", "words"),
    [
        ({"height": 70, "width": 64}, "height", "nearest valid size is 64x64"),
        ({"height": 64, "width": 90}, "width", "nearest valid size is 96x64"),
        ({"height": 0}, "height", "at least 16 pixels; the nearest valid size is 96x16"),
        ({"height": 64, "width": -8}, "width", "at least 16 pixels; the nearest valid size is 16x64"),
        ({"height": 1024, "width": 1024}, "width", "at most 262144 .*; the nearest valid size is 512x512"),
        ({"width": 10**12}, "width", "at most 262144"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 200"),
        ({"num_inference_steps": -5}, "num_inference_steps", "1 to 200"),
        ({"num_inference_steps": 201}, "num_inference_steps", "1 to 200"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "an integer"),
        ({"seed": -1}, "seed", "from 0"),
        ({"seed": 2**63 - 1}, "seed", "from 0"),
        ({"seed": 2**63}, "seed", "an integer of up to 63 bits, got 9223372036854775808"),
        ({"height": -(10**30)}, "height", "an integer of up to 63 bits, got -1000"),
        pytest.param({"width": 10**5000}, "width", "an integer of up to 63 bits, got a huge int", id="huge"),
        pytest.param({"cfg_truncation": 10**5000}, "cfg_truncation", "a number of at most 1.79769", id="huge float"),
        ({"num_outputs_per_prompt": 257}, "n", r"257 pictures at once are more than the queue takes \(256\)"),
        ({"num_outputs_per_prompt": 2**62}, "n", "pictures at once are more than the queue takes"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale", "a number"),
        ({"true_cfg_scale": 10**400}, "true_cfg_scale", r"a number of at most 1\.79769e\+308"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale", "0 to 100"),
        ({"true_cfg_scale": 1e9}, "true_cfg_scale", "0 to 100"),
        ({"guidance_scale": 3.0}, "guidance_scale", "true_cfg_scale"),
        ({"cfg_normalization": True}, "cfg_normalization", "no such parameter"),
        ({"cfg_truncation": 0.5}, "cfg_truncation", "no such parameter"),
        ({"num_outputs_per_prompt": 0}, "num_outputs_per_prompt", "at least 1"),
        ({"num_previews": 4}, "num_previews", "0 to 3"),
        ({"sigmas": (1.0, 0.5), "num_inference_steps": 3}, "sigmas", "3 values"),
        ({"sigmas": (0.5, 1.0)}, "sigmas", "descending"),
        ({"max_sequence_length": 65}, "max_sequence_length", "1 to 64"),
        ({"num_frames": 8}, "num_frames", "single pictures"),
        ({"strength": 0.5}, "strength", "no such parameter"),
        ({"lora_request": LoRARequest("x")}, "lora_request", "no LoRA adapter 'x'; served: none"),
        ({"output_type": "latent"}, "output_type", "pil"),
        ({"cache": True}, "cache", "no --cache-backend"),
        ({"cache": 1}, "cache", "true or false"),
    ],
)
def test_wrong_parameters_are_named(params: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        builder().build(OmniPrompt("x"), OmniDiffusionSamplingParams(**params), "r")
    assert caught.value.param == param
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        (OmniPrompt("w " * 65), "prompt", "65 tokens, at most 64"),
        (OmniPrompt("x", "w " * 65), "negative_prompt", "65 tokens"),
        (OmniPrompt("x" * 32_001), "prompt", "32001 characters"),
        (OmniPrompt("x", images=(object(),)), "image", "takes no input image"),
    ],
)
def test_wrong_prompts_are_named(prompt: OmniPrompt, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        builder().build(prompt, OmniDiffusionSamplingParams(), "r")
    assert caught.value.param == param


def test_custom_sigmas_set_the_number_of_steps() -> None:
    (request,) = builder().build(OmniPrompt("x"), OmniDiffusionSamplingParams(sigmas=(1.0, 0.7, 0.2)), "r")
    assert request.request.num_inference_steps == 3


@pytest.mark.parametrize(
    ("previews", "steps", "expected"), [(0, 20, ()), (1, 20, (10,)), (3, 20, (5, 10, 15)), (3, 2, (1,)), (3, 1, ())]
)
def test_previews_are_spread(previews: int, steps: int, expected: tuple[int, ...]) -> None:
    assert spread_previews(previews, steps) == expected


@pytest.mark.parametrize(
    "value",
    [3, {"text": "x"}, {"prompt": 3}, {"prompt": "x", "negative_prompt": 1}, {"prompt": "x", "multi_modal_data": 1}],
)
def test_prompts_of_the_wrong_form_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError):
        parse_prompt(value)  # type: ignore[arg-type]


def test_prompts_may_be_strings_or_mappings() -> None:
    assert parse_prompt("x") == OmniPrompt("x")
    image = object()
    parsed = parse_prompt({"prompt": "x", "negative_prompt": "y", "multi_modal_data": {"image": image}})
    assert parsed == OmniPrompt("x", "y", (image,))
    for images in ([image, image], (image, image), iter([image, image])):
        assert parse_prompt({"prompt": "x", "multi_modal_data": {"image": images}}).images == (image, image)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"num_inference_steps": "many"},
            "--default-sampling-params: num_inference_steps takes an integer, got 'many'",
        ),
        (
            {"num_inference_steps": 10**6},
            "--default-sampling-params: num_inference_steps takes 1 to 200 (--max-inference-steps), got 1000000",
        ),
        (
            {"height": 63},
            "--default-sampling-params: size 96x63: sides must be multiples of 16; the nearest valid size is 96x64",
        ),
        ({"seed": -1}, "--default-sampling-params: seed takes an integer from 0"),
        ({"true_cfg_scale": "x"}, "--default-sampling-params: true_cfg_scale takes a number"),
        ({"true_cfg_scale": True}, "--default-sampling-params: true_cfg_scale takes a number, got True"),
        ({"guidance_scale": 3.0}, "--default-sampling-params: guidance_scale 3.0: this model has no such parameter"),
        ({"sigmas": "abc"}, "--default-sampling-params: sigmas takes a list of numbers, got 'abc'"),
        ({"max_sequence_length": "8"}, "--default-sampling-params: max_sequence_length takes an integer, got '8'"),
        ({"max_sequence_length": 65}, "--default-sampling-params: max_sequence_length takes 1 to 64, got 65"),
        ({"negative_prompt": 5}, "--default-sampling-params: negative_prompt takes a string, got 5"),
    ],
)
def test_defaults_that_fail_every_request_are_refused_at_start(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_defaults(OmniDiffusionConfig("demo", default_sampling_params=settings), INFO)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"max_inference_steps": 5},
            "--max-inference-steps 5 refuses the model's own default: num_inference_steps takes 1 to 5",
        ),
        (
            {"max_pixels": 100},
            "--max-pixels 100 refuses the model's own default: size 96x64 has 6144 pixels, at most 100 are accepted "
            "(--max-pixels)",
        ),
        (
            {"max_pixels": 1024, "default_sampling_params": {"seed": 3}},
            "--max-pixels 1024 refuses the model's own default: size 96x64 has 6144 pixels",
        ),
        (
            {"max_pixels": 1024, "default_sampling_params": {"width": 128}},
            "--default-sampling-params: size 128x64 has 8192 pixels, at most 1024 are accepted (--max-pixels)",
        ),
        (
            {"max_inference_steps": 5, "default_sampling_params": {"num_inference_steps": 8}},
            "--default-sampling-params: num_inference_steps takes 1 to 5 (--max-inference-steps), got 8",
        ),
        (
            {"max_inference_steps": 2, "default_sampling_params": {"sigmas": [1.0, 0.5, 0.2]}},
            "--default-sampling-params: num_inference_steps takes 1 to 2 (--max-inference-steps), got 3",
        ),
    ],
)
def test_limits_that_fail_every_default_request_are_blamed(settings: dict[str, object], line: str) -> None:
    config = OmniDiffusionConfig("demo", **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_defaults(config, INFO)
    assert str(caught.value).startswith(line)
    assert "0x0" not in str(caught.value)


@pytest.mark.parametrize(("strength", "share"), [(None, 1.0), (1.0, 1.0), (0.25, 0.25)])
def test_steps_that_strength_leaves_out_cost_nothing(strength: float | None, share: float) -> None:
    parameters = (*WHOLE.pipeline.parameters, "strength")
    info = replace(WHOLE, pipeline=replace(WHOLE.pipeline, parameters=parameters))
    price = RequestBuilder(OmniDiffusionConfig("demo"), info, READY)
    params = OmniDiffusionSamplingParams(strength=strength)
    (request,) = price.build(OmniPrompt("x"), params, "r")
    (whole,) = RequestBuilder(OmniDiffusionConfig("demo"), WHOLE, READY).build(
        OmniPrompt("x"), OmniDiffusionSamplingParams(), "r"
    )
    assert request.cost.step == pytest.approx(share * whole.cost.step)
    assert (request.cost.encode, request.cost.decode) == (whole.cost.encode, whole.cost.decode)


@pytest.mark.parametrize(
    ("num_replicas", "num_outputs", "share"), [(1, 1, 1.0), (1, 4, 0.25), (2, 1, 1.0), (2, 4, 0.5), (4, 2, 1.0)]
)
def test_pictures_share_the_price_of_a_prompt_that_each_replica_encodes(
    num_replicas: int, num_outputs: int, share: float
) -> None:
    served = builder(parallel=DiffusionParallelConfig(data_parallel_size=num_replicas))
    params = OmniDiffusionSamplingParams(num_outputs_per_prompt=num_outputs)
    requests = served.build(OmniPrompt("w w"), params, "r")
    assert [request.cost.encode for request in requests] == [pytest.approx(share * 2 * 0.5)] * num_outputs


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_seeds_leave_room_for_those_of_all_pictures(num_outputs: int) -> None:
    highest = 2**63 - 1 - num_outputs
    params = OmniDiffusionSamplingParams(seed=highest, num_outputs_per_prompt=num_outputs)
    assert [r.request.seed for r in builder().build(OmniPrompt("x"), params, "r")] == [
        highest + i for i in range(num_outputs)
    ]
    with pytest.raises(InvalidRequestError, match=f"seed takes an integer from 0 to {highest}, got {highest + 1}"):
        builder().build(OmniPrompt("x"), replace(params, seed=highest + 1), "r")


@pytest.mark.parametrize(("limit", "most"), [(None, 64), (64, 64), (9, 9), (1, 1)])
def test_prompts_may_be_as_long_as_the_limit(limit: int | None, most: int) -> None:
    params = OmniDiffusionSamplingParams(max_sequence_length=limit)
    (request,) = builder().build(OmniPrompt("w " * most, "w " * most), params, "r")
    assert request.num_prompt_tokens == most
    for prompt in (OmniPrompt("w " * (most + 1), "w"), OmniPrompt("w", "w " * (most + 1))):
        with pytest.raises(InvalidRequestError, match=rf"{most + 1} tokens, at most {most} "):
            builder().build(prompt, params, "r")
    builder().build(OmniPrompt("x" * 32_000), OmniDiffusionSamplingParams(), "r")


def test_what_set_a_wrong_default_is_blamed_for_it(tmp_path: Path) -> None:
    info = replace(INFO, path=tmp_path, default_sampling_params={**INFO.default_sampling_params, "height": 63})
    with pytest.raises(ConfigError, match=r"^the model's own default, which follows from its configs: size 96x63"):
        check_defaults(OmniDiffusionConfig("demo"), info)
    (tmp_path / "default_sampling_params.json").write_text('{"height": 63}')
    with pytest.raises(ConfigError, match=r"^the model's own default_sampling_params\.json: size 96x63"):
        check_defaults(OmniDiffusionConfig("demo"), info)


def test_a_default_prompt_must_fit_the_default_length() -> None:
    defaults = {"negative_prompt": "w " * 9, "max_sequence_length": 8}
    with pytest.raises(ConfigError, match=r"^--default-sampling-params: negative_prompt has 9 tokens, at most 8"):
        check_default_prompt(OmniDiffusionConfig("demo", default_sampling_params=defaults), INFO)
    check_default_prompt(OmniDiffusionConfig("demo"), INFO)
    recipes = {"good": {"negative_prompt": "word"}, "long": {"negative_prompt": "word " * 65}}
    with pytest.raises(ConfigError, match=r"^--lora-modules long: negative_prompt has 65 tokens, at most 64"):
        check_default_prompt(OmniDiffusionConfig("demo", lora_defaults=recipes, lora_dirs=("/adapters",)), INFO)


def test_good_defaults_pass() -> None:
    defaults = {"sigmas": [1.0, 0.5], "height": 64, "negative_prompt": "bad", "true_cfg_scale": 2}
    check_defaults(OmniDiffusionConfig("demo", default_sampling_params=defaults), INFO)


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    """NumPy's and other numbers become plain Python ones, which can be sent to a worker."""
    numbers: dict[str, Any] = {
        "height": np.int64(64),
        "width": np.uint8(96),
        "num_inference_steps": np.int32(3),
        "true_cfg_scale": np.float64(4.0),
        "seed": np.int64(7),
        "sigmas": list(np.linspace(1.0, 0.2, 3)),
        "priority": np.int8(-1),
        "num_outputs_per_prompt": np.int64(2),
        "num_previews": np.int64(1),
    }
    params = OmniDiffusionSamplingParams(**numbers)
    served = builder(default_sampling_params={"max_sequence_length": np.int64(8)})
    requests = served.build(OmniPrompt(np.str_("x"), np.str_("y")), params, "r")
    plain = replace(params, height=64, width=96, num_inference_steps=3, true_cfg_scale=4.0, seed=7, priority=-1)
    plain = replace(plain, num_outputs_per_prompt=2, num_previews=1, sigmas=(1.0, 0.6, 0.2), max_sequence_length=8)
    same = builder().build(OmniPrompt("x", "y"), plain, "r")
    assert [replace(r, arrival=0) for r in requests] == [replace(r, arrival=0) for r in same]
    msgspec.msgpack.encode(requests)
    sigmas: Any = np.linspace(1, 0.5, 2)
    (request,) = builder().build(OmniPrompt("x"), OmniDiffusionSamplingParams(sigmas=sigmas), "r")
    assert request.request.sigmas == (1.0, 0.5)


def test_numbers_in_tensors_become_plain_ones() -> None:
    numbers: dict[str, Any] = {
        "height": torch.tensor(64),
        "width": np.array(96),
        "true_cfg_scale": torch.tensor(4.0, dtype=torch.bfloat16),
        "seed": torch.tensor(7),
        "sigmas": torch.linspace(1, 0.5, 3),
        "cache": np.array(False),
    }
    params = OmniDiffusionSamplingParams(**numbers)
    (request,) = builder().build(OmniPrompt("x", "y"), params, "r")
    assert (request.request.height, request.request.width, request.request.true_cfg_scale, request.request.seed) == (
        64,
        96,
        4.0,
        7,
    )
    assert (request.request.sigmas, request.request.num_inference_steps) == ((1.0, 0.75, 0.5), 3)
    msgspec.msgpack.encode(request)


NO_NUMBERS: list[Any] = [True, np.True_, "1", 1j, float("nan"), [True], np.zeros((1, 1)), torch.tensor(True)]
NO_NUMBERS += [torch.empty((), device="meta"), iter([1.0])]


@pytest.mark.parametrize(
    "name",
    [
        "height",
        "width",
        "num_inference_steps",
        "true_cfg_scale",
        "seed",
        "sigmas",
        "priority",
        "num_outputs_per_prompt",
        "num_previews",
        "max_sequence_length",
        "num_frames",
    ],
)
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} takes a") as caught:
        builder().build(OmniPrompt("x"), OmniDiffusionSamplingParams(**{name: value}), "r")
    assert caught.value.param == name


@pytest.mark.parametrize("text", ["\ud800", 5, b"x"])
def test_prompts_are_text(text: Any) -> None:
    for name, prompt in (("prompt", OmniPrompt(text)), ("negative_prompt", OmniPrompt("x", text))):
        with pytest.raises(InvalidRequestError, match=f"^{name} ") as caught:
            builder().build(prompt, OmniDiffusionSamplingParams(), "r")
        assert caught.value.param == name


def test_a_default_that_no_request_would_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown keys \\['priority'\\]"):
        OmniDiffusionConfig("demo", default_sampling_params={"priority": 1})


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        (OmniPrompt("x", "y"), {}, "negative_prompt"),
        (OmniPrompt("x"), {"true_cfg_scale": 2.0}, "true_cfg_scale"),
        (OmniPrompt("x"), {"strength": 0.5}, "strength"),
        (OmniPrompt("x"), {"sigmas": (1.0, 0.5)}, "sigmas"),
        (OmniPrompt("x"), {"max_sequence_length": 8}, "max_sequence_length"),
        (OmniPrompt("x"), {"num_previews": 1}, "num_previews"),
    ],
)
def test_what_a_whole_pipeline_does_not_take_is_named(prompt: OmniPrompt, params: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=param) as caught:
        RequestBuilder(OmniDiffusionConfig("demo"), WHOLE, READY).build(
            prompt, OmniDiffusionSamplingParams(**params), "r"
        )
    assert caught.value.param == param
    assert "it takes height, width, num_inference_steps, guidance_scale" in str(caught.value) or param == "num_previews"


def test_guidance_without_a_negative_prompt_is_priced() -> None:
    whole = RequestBuilder(OmniDiffusionConfig("demo"), WHOLE, READY)
    (guided,) = whole.build(OmniPrompt("a cat"), OmniDiffusionSamplingParams(), "r")
    (plain,) = whole.build(OmniPrompt("a cat"), OmniDiffusionSamplingParams(guidance_scale=1.0), "r")
    (one_of_two, _) = whole.build(
        OmniPrompt("a cat"), OmniDiffusionSamplingParams(guidance_scale=1.0, num_outputs_per_prompt=2), "r"
    )
    assert one_of_two.cost == plain.cost  # diffusers encodes for each
    assert (len(guided.cost.branch_tokens), len(plain.cost.branch_tokens)) == (2, 1)
    assert (guided.request.guidance_scale, guided.request.negative_prompt) == (5.0, None)


def test_a_default_negative_prompt_that_the_model_does_not_take_ends_the_start() -> None:
    config = OmniDiffusionConfig("demo", default_sampling_params={"negative_prompt": "bad"})
    with pytest.raises(ConfigError, match="--default-sampling-params: negative_prompt 'bad': this model has no such"):
        check_defaults(config, WHOLE)


@pytest.mark.parametrize(
    ("backend", "cache", "cached"),
    [
        ("none", None, False),
        ("none", False, False),
        ("tea_cache", None, True),
        ("cache_dit", True, True),
        ("cache_dit", False, False),
    ],
)
def test_a_request_may_opt_out_of_the_cache(backend: str, cache: bool | None, cached: bool) -> None:
    requests = builder(cache_backend=backend).build(OmniPrompt("x"), OmniDiffusionSamplingParams(cache=cache), "r")
    assert [request.request.cache for request in requests] == [cached]


def test_a_server_may_leave_its_cache_to_those_that_ask_for_it() -> None:
    defaults = {"cache_backend": "tea_cache", "default_sampling_params": {"cache": False}}
    for asked, cached in ((None, False), (True, True)):
        (request,) = builder(**defaults).build(OmniPrompt("x"), OmniDiffusionSamplingParams(cache=asked), "r")
        assert request.request.cache is cached
