"""Build requests from prompts and sampling parameters: fill in defaults, check, count tokens, price.

Everything that can be known to be wrong is refused here, before it takes time of other requests.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_omni.diffusion.catalog.configs import MIN_FLOW_SHIFT
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.adapter_prices import num_adapter_weights
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.control.adapters import recipes_of, resolve_loras
from vllm_omni.diffusion.control.admission import check_number
from vllm_omni.diffusion.control.default_values import common_recipe, fill, given_values, layered
from vllm_omni.diffusion.control.frames import FrameLimits, shown_seconds
from vllm_omni.diffusion.control.scheduled_request import RequestCost, ScheduledRequest
from vllm_omni.diffusion.control.sizes import SizeLimits
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import InvalidRequestError, UnsupportedParameterError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.inputs.field_values import WrongValueError, coerce, field_types, shown
from vllm_omni.inputs.images import InputImage, prepare_image
from vllm_omni.video_writer import MAX_FPS

MAX_PROMPT_CHARACTERS = 32_000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
MAX_PREVIEWS = 3
MAX_FLOW_SHIFT = 100.0
OUTPUT_TYPES = ("pil", "np")
GUIDANCE_PARAMETERS = ("true_cfg_scale", "guidance_scale", "guidance_scale_2", "cfg_normalization", "cfg_truncation")
OPTIONAL_PARAMETERS = (
    *GUIDANCE_PARAMETERS,
    "strength",
    "sigmas",
    "flow_shift",
    "max_sequence_length",
    "seconds",
    "fps",
)
"""Parameters that only some models take: see `ModelInfo.parameters`."""
HARMLESS = {"guidance_scale_2": 1.0}
"""Parameter -> value that asks for nothing: scripts of the public package give it to every model."""


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt and its parameters, checked by `RequestBuilder.check`."""

    prompt: OmniPrompt
    """The prompt with its pictures at the sizes that the model takes."""
    given: OmniDiffusionSamplingParams
    """The parameters that the caller gave."""
    params: OmniDiffusionSamplingParams
    """`given`, filled from `defaults`."""
    defaults: dict[str, Any]


class RequestBuilder:
    """Builds the requests of callers' prompts and sampling parameters, for one model on one engine."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        info: ModelInfo,
        ready: WorkerReady,
        adapters: AdapterRegistry | None = None,
    ) -> None:
        """adapters: those that requests may name; None: those of the config."""
        self._config = config
        self._adapters = AdapterRegistry(config) if adapters is None else adapters
        self._info = info
        self._ready = ready
        self.tokenizing = threading.Lock()
        """Held while tokens are counted: a tokenizer is used by one thread at a time."""

    def build(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams, request_id: str) -> list[ScheduledRequest]:
        """Build one request per output: `{request_id}-{i}` with `seed + i`.

        Raises InvalidRequestError whose `param` is the field of `OmniDiffusionSamplingParams` or `OmniPrompt`.
        """
        return self.build_checked(self.check(prompt, params), request_id)

    def build_checked(self, checked: CheckedPrompt, request_id: str) -> list[ScheduledRequest]:
        """Second part of `build`: count tokens, draw the seed and price, after `check`. May run in any thread.

        Raises as `build`.
        """
        prompt, filled = checked.prompt, checked.params
        if prompt.negative_prompt is None:
            prompt = replace(prompt, negative_prompt=checked.defaults.get("negative_prompt"))
        request = self._first_request(prompt, filled, request_id)
        with self.tokenizing:
            scheduled = self._scheduled(request, filled)
        return [
            replace(scheduled, request=replace(request, request_id=f"{request_id}-{i}", seed=request.seed + i))
            for i in range(filled.num_outputs_per_prompt)
        ]

    def _first_request(
        self, prompt: OmniPrompt, filled: OmniDiffusionSamplingParams, request_id: str
    ) -> DiffusionRequest:
        """The request of the first output. `filled`: checked parameters with all defaults."""
        assert filled.height is not None
        assert filled.width is not None
        assert filled.num_inference_steps is not None
        guidance = self._info.guidance
        scale, negative = guidance.resolved(getattr(filled, guidance.parameter), prompt.negative_prompt)
        return DiffusionRequest(
            request_id=f"{request_id}-0",
            prompt=prompt.prompt,
            height=filled.height,
            width=filled.width,
            num_inference_steps=filled.num_inference_steps,
            seed=secrets.randbelow(2**32) if filled.seed is None else filled.seed,
            max_sequence_length=filled.max_sequence_length or self._info.max_prompt_tokens,
            negative_prompt=negative,
            true_cfg_scale=scale,
            guidance_scale=filled.guidance_scale,
            cfg_normalization=float(filled.cfg_normalization or 0),
            cfg_truncation=1.0 if filled.cfg_truncation is None else filled.cfg_truncation,
            sigmas=None if filled.sigmas is None else tuple(filled.sigmas),
            cache=self._config.cache_backend != "none" and filled.cache is not False,
            images=tuple(prompt.images),
            strength=filled.strength,
            loras=resolve_loras(filled, self._config, self._info, self._adapters),
            num_frames=filled.num_frames or 1,
            fps=self._info.default_fps if filled.fps is None else filled.fps,
            guidance_scale_2=self._second_scale(filled.guidance_scale_2),
            flow_shift=filled.flow_shift,
        )

    def _second_scale(self, scale: float | None) -> float | None:
        guidance = self._info.guidance
        return None if scale is None or "guidance_scale_2" not in guidance.options else scale + guidance.offset

    def _scheduled(self, request: DiffusionRequest, filled: OmniDiffusionSamplingParams) -> ScheduledRequest:
        """Count the tokens of `request`, which must not exceed the model's limits, and price it."""
        info, limit, negative = self._info, filled.max_sequence_length, request.negative_prompt
        num_prompt_tokens = count_tokens("prompt", request.prompt, limit, info)
        num_negative = 0 if negative is None else count_tokens("negative_prompt", negative, limit, info)
        num_seen = info.count_image_prompt_tokens(request.images)
        text_tokens = [num_prompt_tokens + num_seen, num_negative + num_seen][: 1 + request.has_guidance]
        num_image_tokens = info.num_image_tokens(request.height, request.width, request.num_frames)
        num_reference_tokens = sum(map(info.num_reference_tokens, request.images))
        return ScheduledRequest(
            request,
            self._price(request, text_tokens, num_image_tokens, num_reference_tokens, filled.num_outputs_per_prompt),
            num_prompt_tokens,
            num_image_tokens,
            num_latent_frames=info.latent_frames(request.num_frames) if info.decodes_in_pieces else 1,
            num_encoded_frames=info.num_encoded_frames(request.images, request.num_frames),
            num_reference_tokens=num_reference_tokens,
            priority=filled.priority,
            preview_steps=spread_previews(filled.num_previews, request.num_inference_steps),
            arrival=time.monotonic(),
        )

    def check(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> CheckedPrompt:
        """First part of `build`: check everything but token counts, and resize the pictures to what the model takes.

        May run in any thread: large pictures take about a second. Raises as `build`.
        """
        prompt, params = _fit_prompt(prompt), _fit_params(params)
        check_supported(prompt, params, self._info)
        check_num_images(len(prompt.images), self._info)
        images = tuple(_prepare(image, self._info) for image in prompt.images)
        defaults = self._defaults_of(images, params, prompt.negative_prompt)
        filled = check_values(fill(params, defaults), self._config, self._info)
        _check_frames_for(len(images), filled.num_frames, self._info)
        assert filled.height is not None
        assert filled.width is not None
        fitted = tuple(self._info.fit_image(image, filled.height, filled.width) for image in images)
        return CheckedPrompt(replace(prompt, images=fitted), params, filled, defaults)

    def _defaults_of(
        self, images: Sequence[InputImage], params: OmniDiffusionSamplingParams, negative_prompt: str | None
    ) -> dict[str, Any]:
        """Defaults of the adapters over those of the server over those of the model.

        The size of an edit follows from its input pictures. Raises InvalidRequestError for adapters that differ.
        """
        server = self._config.default_sampling_params
        given = given_values(params) | ({} if negative_prompt is None else {"negative_prompt": negative_prompt})
        recipe = common_recipe(recipes_of(params, self._config, self._adapters), given)
        defaults = layered(recipe, server, self._info.default_sampling_params)
        if images:
            asked = fill(params, layered(recipe, server))
            defaults["height"], defaults["width"] = self._edited_size(images, asked.height, asked.width)
        return defaults

    def _edited_size(self, images: Sequence[InputImage], height: int | None, width: int | None) -> tuple[int, int]:
        """Size of an edit: the sides that were asked for, and the model's choice within the limits for others."""
        assert self._info.image_input is not None
        sizes, own = SizeLimits.of(self._config, self._info), self._info.image_input.output_size(images)
        if width is None:
            return sizes.fit(*own) if height is None else (height, sizes.fit_side(height, own[1]))
        return sizes.fit_side(width, own[0]) if height is None else height, width

    def _price(
        self,
        request: DiffusionRequest,
        text_tokens: Sequence[int],
        num_image_tokens: int,
        num_reference_tokens: int,
        num_outputs: int,
    ) -> RequestCost:
        """Estimate the work of one of `num_outputs` requests that differ in their seeds alone.

        text_tokens: of each branch, with those of input pictures. Encoding an input picture is priced as a decode.
        """
        info, ready = self._info, self._ready
        video = request.height, request.width, request.num_frames
        lengths = info.branch_tokens(text_tokens, num_image_tokens, num_reference_tokens)
        num_encoded = sum(map(info.num_encoded_tokens, text_tokens))
        num_encoded_image = info.num_encoded_image_tokens(request.images, *video)
        encode_text = ready.encode_units_per_token * num_encoded
        encode_images = ready.decode_units_per_token * num_encoded_image
        share = 1.0
        if info.shares_encodings:  # each replica encodes prompt and pictures once; all outputs begin together
            share = min(1.0, self._config.parallel.data_parallel_size / num_outputs)
        is_cut = info.num_encoded_frames(request.images, request.num_frames) > 1
        step = sum(map(info.sequence_cost, lengths))
        overhead = 0.0
        if request.loras:
            step += sum(lengths) * info.adapter_cost(num_adapter_weights(request.loras))
            # Each adapter launches about as many products as the step itself.
            overhead = len(request.loras) * ready.step_overhead_seconds / ready.seconds_per_unit
        return RequestCost(
            encode=share * (encode_text + encode_images),
            encode_video=share * encode_images if is_cut else 0.0,
            step=(1.0 if request.strength is None else request.strength) * step + overhead,
            decode=ready.decode_units_per_token * info.num_decoded_tokens(*video),
            branch_tokens=lengths,
        )


def count_tokens(name: str, text: str, limit: int | None, info: ModelInfo) -> int:
    """Count the tokens of a prompt. Raises InvalidRequestError above `limit` (None: the model's own limit)."""
    check_text(name, text)
    longest = info.max_prompt_tokens
    limit = longest if limit is None else limit
    if (num_tokens := info.count_prompt_tokens(text)) > limit:
        advice = f" (max_sequence_length, which may be up to {longest})" if limit < longest else ""
        raise InvalidRequestError(f"{name} has {num_tokens} tokens, at most {limit} are accepted{advice}", param=name)
    return num_tokens


def check_text(name: str, text: str) -> None:
    """Raise InvalidRequestError for a prompt that is too long to be read, or that UTF-8 cannot encode."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequestError(
            f"{name} has {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted", param=name
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: tokenizers fail on it
        raise InvalidRequestError(f"{name} is not valid Unicode: {error}", param=name) from error


def check_values(
    params: OmniDiffusionSamplingParams, config: OmniDiffusionConfig, info: ModelInfo
) -> OmniDiffusionSamplingParams:
    """Check filled parameters against all limits; return them as plain Python values."""
    params = _fit_params(params)
    _check_params(params, info)
    check_number(params.num_outputs_per_prompt, config.max_num_queued_reqs)
    assert params.height is not None
    assert params.width is not None
    SizeLimits.of(config, info).check(params.height, params.width)
    _check_steps(params, config.max_inference_steps)
    if info.makes_videos:
        params = _with_frames(params, FrameLimits.of(config, info), info.default_fps)
    if params.cache and config.cache_backend == "none":
        raise InvalidRequestError("cache takes false or null here: the server has no --cache-backend", param="cache")
    return params


def _check_steps(params: OmniDiffusionSamplingParams, most: int) -> None:
    steps = params.num_inference_steps
    assert steps is not None
    _require(1 <= steps <= most, "num_inference_steps", steps, f"1 to {most} (--max-inference-steps)")
    if params.sigmas is not None:
        descending = all(a > b for a, b in zip(params.sigmas, params.sigmas[1:]))
        in_range = all(0 < s <= 1 for s in params.sigmas)
        _require(
            len(params.sigmas) == steps and descending and in_range,
            "sigmas",
            params.sigmas,
            f"{steps} values (one a step), descending, above 0 and at most 1",
        )


def _with_frames(
    params: OmniDiffusionSamplingParams, limits: FrameLimits, default_fps: int | None
) -> OmniDiffusionSamplingParams:
    """Parameters of a video with its number of frames, which may follow from `seconds`. Raises InvalidRequestError."""
    if (seconds := params.seconds) is not None:
        if (fps := params.fps or default_fps) is None:
            raise InvalidRequestError(
                f"seconds {shown_seconds(seconds)} needs fps: this model has none of its own", param="fps"
            )
        num_frames = limits.of_seconds(seconds, fps)
        if params.num_frames not in (None, num_frames):
            raise InvalidRequestError(
                f"num_frames {params.num_frames} and seconds {shown_seconds(seconds)}, which are {num_frames} frames "
                f"at {fps} a second, differ: give one of them",
                param="num_frames",
            )
        params = replace(params, num_frames=num_frames)
    assert params.num_frames is not None
    limits.check(params.num_frames)
    return params


def spread_previews(num_previews: int, num_steps: int) -> tuple[int, ...]:
    """Steps (1-based) after which previews are due: evenly spread, never the last step."""
    wanted = {round(num_steps * (i + 1) / (num_previews + 1)) for i in range(num_previews)}
    return tuple(sorted(step for step in wanted if 1 <= step < num_steps))


def check_num_images(num_images: int, info: ModelInfo) -> None:
    """Raise InvalidRequestError for more or fewer input pictures than the model takes."""
    if info.image_input is None:
        if num_images:
            made = "videos" if info.makes_videos else "pictures"
            raise InvalidRequestError(f"this model makes {made} from text and takes no input image", param="image")
    elif num_images < info.image_input.min_images:
        does = "makes videos from pictures" if info.makes_videos else "edits pictures"
        raise InvalidRequestError(
            f'this model {does} and got none; it takes them as multi_modal_data={{"image": ...}}', param="image"
        )
    elif num_images > (most := info.image_input.max_images):
        raise InvalidRequestError(f"image takes at most {most} pictures on this model, got {num_images}", param="image")


def _check_frames_for(num_images: int, num_frames: int | None, info: ModelInfo) -> None:
    """Raise InvalidRequestError for a video with fewer latent frames than the pictures that it begins and ends with."""
    if info.frame_multiple is None or num_images <= info.latent_frames(num_frames or 1):
        return
    raise InvalidRequestError(
        f"image takes {num_images} pictures with num_frames from {1 + (num_images - 1) * info.frame_multiple}, got "
        f"num_frames {num_frames}",
        param="image",
    )


def _prepare(image: Any, info: ModelInfo) -> InputImage:
    """Prepare an input picture for the model, unless that was done before."""
    if isinstance(image, InputImage):
        return image
    assert info.image_input is not None
    return prepare_image(image, info.image_input.sizes)


def check_supported(prompt: OmniPrompt, params: OmniDiffusionSamplingParams, info: ModelInfo) -> None:
    """Raise InvalidRequestError for parameters that have no meaning for this model."""
    given = {name: getattr(params, name) for name in OPTIONAL_PARAMETERS} | {"negative_prompt": prompt.negative_prompt}
    for name, value in given.items():
        if value is not None and name not in info.parameters and value != HARMLESS.get(name):
            raise UnsupportedParameterError(name, value, info.parameters)
    if params.num_previews and not info.gives_previews:
        raise InvalidRequestError(
            f"num_previews {params.num_previews}: this model gives no previews (partial images)", param="num_previews"
        )
    if params.num_frames not in (None, 1) and not info.makes_videos:
        raise InvalidRequestError(
            f"num_frames {params.num_frames}: this model makes single pictures", param="num_frames"
        )
    if params.output_type not in OUTPUT_TYPES:
        raise InvalidRequestError(
            f"output_type takes {', '.join(OUTPUT_TYPES)}, got {params.output_type!r}", param="output_type"
        )


def _fit_prompt(prompt: OmniPrompt) -> OmniPrompt:
    """Check that prompts are strings that UTF-8 can encode; return them as plain strings."""
    return replace(
        prompt,
        prompt=_fit_text("prompt", prompt.prompt, str),
        negative_prompt=_fit_text("negative_prompt", prompt.negative_prompt, str | None),
    )


def _fit_text(name: str, value: Any, kind: Any) -> Any:
    text = _fit(name, value, kind)
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} is not valid Unicode: {error}", param=name) from error
    return text


def _fit_params(params: OmniDiffusionSamplingParams) -> OmniDiffusionSamplingParams:
    kinds = field_types(OmniDiffusionSamplingParams)
    return replace(params, **{name: _fit(name, getattr(params, name), kind) for name, kind in kinds.items()})


def _fit(name: str, value: Any, kind: Any) -> Any:
    try:
        return coerce(value, kind)
    except WrongValueError as error:
        raise InvalidRequestError(f"{name} takes {error}, got {shown(value)}", param=name) from error


def _check_params(params: OmniDiffusionSamplingParams, info: ModelInfo) -> None:
    _require(params.num_outputs_per_prompt >= 1, "num_outputs_per_prompt", params.num_outputs_per_prompt, "at least 1")
    _require(0 <= params.num_previews <= MAX_PREVIEWS, "num_previews", params.num_previews, f"0 to {MAX_PREVIEWS}")
    _require(-(2**31) <= params.priority < 2**31, "priority", params.priority, "a 32-bit integer")
    if (seed := params.seed) is not None:
        highest = MAX_SEED - params.num_outputs_per_prompt
        _require(0 <= seed <= highest, "seed", seed, f"an integer from 0 to {highest}")
    if (limit := params.max_sequence_length) is not None:
        _require(1 <= limit <= info.max_prompt_tokens, "max_sequence_length", limit, f"1 to {info.max_prompt_tokens}")
    if (strength := params.strength) is not None:
        _require(0 < strength <= 1, "strength", strength, "a number above 0 and at most 1 (at 0 no step is left)")
    if (fps := params.fps) is not None:
        _require(1 <= fps <= MAX_FPS, "fps", fps, f"1 to {MAX_FPS}")
    if (seconds := params.seconds) is not None:
        _require(0 <= seconds < math.inf, "seconds", seconds, "a number of at least 0")
    if (shift := params.flow_shift) is not None:
        expected = f"a number from {MIN_FLOW_SHIFT} to {MAX_FLOW_SHIFT:g}"
        _require(MIN_FLOW_SHIFT <= shift <= MAX_FLOW_SHIFT, "flow_shift", shift, expected)
    for name in GUIDANCE_PARAMETERS:
        most = 1.0 if name == "cfg_truncation" else MAX_GUIDANCE
        if (value := getattr(params, name)) is not None:
            _require(0 <= value <= most, name, value, f"a number from 0 to {most:g}")


def _require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{name} takes {expected}, got {shown(got)}", param=name)
