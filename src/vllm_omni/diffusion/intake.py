"""From a prompt and sampling parameters to fully resolved, checked and priced requests. No torch here.

Everything that can be known to be wrong is refused here, before a request costs anybody anything.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.plan import WorkerReady
from vllm_omni.diffusion.registry import ModelInfo
from vllm_omni.diffusion.request import DiffusionRequest, RequestCost
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

MAX_PROMPT_CHARACTERS = 32_000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
MAX_PREVIEWS = 3
LEAST_MAX_PIXELS = 1024 * 1024
"""Clients ask for sizes like 512x512 whatever the model: the default limit lets them."""
OUTPUT_TYPES = ("pil", "np")
GUIDANCE_PARAMETERS = ("true_cfg_scale", "guidance_scale", "cfg_normalization", "cfg_truncation")
"""A family takes some of them: `ModelInfo.guidance`."""


class Intake:
    """Turns what callers write into `DiffusionRequest`s, for one model on one engine."""

    def __init__(self, config: OmniDiffusionConfig, info: ModelInfo, ready: WorkerReady) -> None:
        self._config = config
        self._info = info
        self._ready = ready
        self._defaults: dict[str, Any] = {**info.default_sampling_params, **config.default_sampling_params}

    def resolve(
        self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams, request_id: str
    ) -> list[DiffusionRequest]:
        """One request an output, `{request_id}-{i}` with `seed + i`.

        Raises InvalidRequestError whose `param` is the field of `OmniDiffusionSamplingParams` or `OmniPrompt`.
        """
        _check_supported(prompt, params, self._info)
        filled = self._filled(params)
        assert filled.height is not None
        assert filled.width is not None
        assert filled.num_inference_steps is not None
        negative = prompt.negative_prompt
        if negative is None:
            negative = self._defaults.get("negative_prompt")
        guidance = self._info.guidance
        scale = getattr(filled, guidance.parameter)
        true_cfg_scale = 1.0 if scale is None else scale + guidance.offset
        if negative is None and true_cfg_scale > 1:
            negative = guidance.negative_prompt
        num_tokens = self._count_tokens("prompt", prompt.prompt, filled)
        num_negative = None if negative is None else self._count_tokens("negative_prompt", negative, filled)
        seed = secrets.randbelow(2**32) if filled.seed is None else filled.seed
        first = DiffusionRequest(
            request_id=f"{request_id}-0",
            prompt=prompt.prompt,
            negative_prompt=negative,
            height=filled.height,
            width=filled.width,
            num_inference_steps=filled.num_inference_steps,
            true_cfg_scale=true_cfg_scale,
            guidance_scale=filled.guidance_scale,
            seed=seed,
            max_sequence_length=filled.max_sequence_length or self._info.max_prompt_tokens,
            sigmas=filled.sigmas,
            priority=filled.priority,
            preview_steps=spread_previews(filled.num_previews, filled.num_inference_steps),
            cost=RequestCost(0, 0, 0, ()),
            num_prompt_tokens=num_tokens,
            num_image_tokens=self._info.num_image_tokens(filled.height, filled.width),
            arrival=time.monotonic(),
            cfg_normalization=float(filled.cfg_normalization or 0),
            cfg_truncation=1.0 if filled.cfg_truncation is None else filled.cfg_truncation,
        )
        branches = [num_tokens, num_negative] if first.has_guidance and num_negative is not None else [num_tokens]
        first = replace(first, cost=self._price(first.num_image_tokens, branches))
        return [
            replace(first, request_id=f"{request_id}-{i}", seed=seed + i) for i in range(filled.num_outputs_per_prompt)
        ]

    def _filled(self, params: OmniDiffusionSamplingParams) -> OmniDiffusionSamplingParams:
        """`params` with the defaults, checked."""
        return _check_values(_fill(params, self._defaults), self._config, self._info)

    def _price(self, num_image_tokens: int, text_tokens: list[int]) -> RequestCost:
        lengths = [self._info.num_sequence_tokens(n, num_image_tokens) for n in text_tokens]
        return RequestCost(
            encode=self._ready.encode_units_per_token * sum(text_tokens),
            step=sum(self._info.sequence_cost(n) for n in lengths),
            decode=self._ready.decode_units_per_token * num_image_tokens,
            branch_tokens=tuple(lengths),
        )

    def _count_tokens(self, name: str, text: str, params: OmniDiffusionSamplingParams) -> int:
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequestError(
                f"{name} has {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted", param=name
            )
        longest = self._info.max_prompt_tokens
        limit = longest if params.max_sequence_length is None else params.max_sequence_length
        _require(1 <= limit <= longest, "max_sequence_length", limit, f"1 to {longest}")
        if (num_tokens := self._info.count_prompt_tokens(text)) > limit:
            raise InvalidRequestError(
                f"{name} has {num_tokens} tokens, at most {limit} are accepted "
                f"(max_sequence_length, which may be up to {longest})",
                param=name,
            )
        return num_tokens


def check_default_sampling_params(config: OmniDiffusionConfig, info: ModelInfo) -> None:
    """Refuse the server's defaults if requests that rely on them would fail. Raises ConfigError.

    Their length in tokens is not checked: the tokenizer takes seconds to load.
    """
    if not config.default_sampling_params:
        return
    values = dict(config.default_sampling_params)
    negative_prompt = values.pop("negative_prompt", None)
    try:
        if not isinstance(negative_prompt, str | None):
            raise InvalidRequestError(f"negative_prompt must be a string, got {negative_prompt!r}")
        params = OmniDiffusionSamplingParams(**values)
        _check_supported(OmniPrompt(""), params, info)
        _check_values(_fill(params, info.default_sampling_params), config, info)
    except InvalidRequestError as error:
        raise ConfigError(f"--default-sampling-params: {error}") from error


def _check_values(
    params: OmniDiffusionSamplingParams, config: OmniDiffusionConfig, info: ModelInfo
) -> OmniDiffusionSamplingParams:
    _check_params(params)
    assert params.height is not None
    assert params.width is not None
    _check_size(params.height, params.width, config, info)
    _check_steps(params, config.max_inference_steps)
    return params


def _check_size(height: int, width: int, config: OmniDiffusionConfig, info: ModelInfo) -> None:
    multiple = info.size_multiple
    for name, value in (("height", height), ("width", width)):
        _require(value >= multiple, name, value, f"at least {multiple} pixels")
    # The size first: a huge number is refused as huge, not told its nearest multiple.
    if height * width > (most := _max_pixels(config, info)):
        raise InvalidRequestError(
            f"size {width}x{height} has {height * width} pixels, at most {most} are accepted (--max-pixels)",
            param="height" if height > width else "width",
        )
    if height % multiple or width % multiple:
        nearest = [max(multiple, round(v / multiple) * multiple) for v in (width, height)]
        raise InvalidRequestError(
            f"size {width}x{height}: sides must be multiples of {multiple}; "
            f"the nearest valid size is {nearest[0]}x{nearest[1]}",
            param="height" if height % multiple else "width",
        )


def _max_pixels(config: OmniDiffusionConfig, info: ModelInfo) -> int:
    """The given limit, or the default one: four times the model's own size, and never less than common sizes."""
    if config.max_pixels is not None:
        return config.max_pixels
    own = info.default_sampling_params
    return max(LEAST_MAX_PIXELS, 4 * int(own["height"]) * int(own["width"]))


def _check_steps(params: OmniDiffusionSamplingParams, most: int) -> None:
    steps = params.num_inference_steps
    assert steps is not None
    _require(1 <= steps <= most, "num_inference_steps", steps, f"1 to {most}")
    if params.sigmas is not None:
        descending = all(a > b for a, b in zip(params.sigmas, params.sigmas[1:]))
        in_range = all(0 < s <= 1 for s in params.sigmas)
        _require(
            len(params.sigmas) == steps and descending and in_range,
            "sigmas",
            params.sigmas,
            f"{steps} values (one a step), descending, above 0 and at most 1",
        )


def spread_previews(num_previews: int, num_steps: int) -> tuple[int, ...]:
    """The 1-based steps after which previews are due: evenly spread, never the last step."""
    wanted = {round(num_steps * (i + 1) / (num_previews + 1)) for i in range(num_previews)}
    return tuple(sorted(step for step in wanted if 1 <= step < num_steps))


def _fill(params: OmniDiffusionSamplingParams, defaults: Mapping[str, Any]) -> OmniDiffusionSamplingParams:
    if isinstance(params.sigmas, list | tuple) and params.num_inference_steps is None:
        params = replace(params, num_inference_steps=len(params.sigmas))
    return params.filled_from(defaults)


def _check_supported(prompt: OmniPrompt, params: OmniDiffusionSamplingParams, info: ModelInfo) -> None:
    """Refuse what this model has no meaning for, instead of dropping it."""
    if prompt.images:
        raise InvalidRequestError(
            "this model makes pictures from text and takes no input image; send it to /v1/images/generations",
            param="image",
        )
    for name in ("strength", "fps"):
        if (value := getattr(params, name)) is not None:
            raise InvalidRequestError(f"{name} {value!r}: a text-to-image model has no such parameter", param=name)
    if params.num_frames not in (None, 1):
        raise InvalidRequestError(
            f"num_frames {params.num_frames}: this model makes single pictures", param="num_frames"
        )
    if params.lora_request is not None or params.lora_scale is not None:
        raise InvalidRequestError("LoRA adapters are not available yet", param="lora_request")
    for name in GUIDANCE_PARAMETERS:
        if (value := getattr(params, name)) is not None and name not in info.guidance.parameters:
            raise InvalidRequestError(
                f"{name} {value!r}: this model has no such parameter; its guidance takes "
                f"{', '.join(info.guidance.parameters)}",
                param=name,
            )
    if params.output_type not in OUTPUT_TYPES:
        raise InvalidRequestError(
            f"output_type takes {', '.join(OUTPUT_TYPES)}, got {params.output_type!r}", param="output_type"
        )


def _check_params(params: OmniDiffusionSamplingParams) -> OmniDiffusionSamplingParams:
    for name in ("height", "width", "num_inference_steps", "num_outputs_per_prompt", "num_previews", "priority"):
        value = getattr(params, name)
        _require(isinstance(value, int) and not isinstance(value, bool), name, value, "an integer")
    _require(params.num_outputs_per_prompt >= 1, "num_outputs_per_prompt", params.num_outputs_per_prompt, "at least 1")
    _require(0 <= params.num_previews <= MAX_PREVIEWS, "num_previews", params.num_previews, f"0 to {MAX_PREVIEWS}")
    _require(-(2**31) <= params.priority < 2**31, "priority", params.priority, "a 32-bit integer")
    if params.seed is not None:
        highest = MAX_SEED - params.num_outputs_per_prompt
        good = isinstance(params.seed, int) and not isinstance(params.seed, bool) and 0 <= params.seed <= highest
        _require(good, "seed", params.seed, f"an integer from 0 to {highest}")
    if (limit := params.max_sequence_length) is not None:
        _require(isinstance(limit, int) and not isinstance(limit, bool), "max_sequence_length", limit, "an integer")
    if (sigmas := params.sigmas) is not None:
        good = isinstance(sigmas, list | tuple) and all(isinstance(s, int | float) for s in sigmas)
        _require(good, "sigmas", sigmas, "a list of numbers")
    for name in GUIDANCE_PARAMETERS:
        most = 1.0 if name == "cfg_truncation" else MAX_GUIDANCE
        if (value := getattr(params, name)) is not None:
            good = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= most
            _require(good, name, value, f"a number from 0 to {most:g}")
    return params


def _require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{name} takes {expected}, got {got!r}", param=name)
