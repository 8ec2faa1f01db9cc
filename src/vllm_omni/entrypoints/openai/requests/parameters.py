"""From the body of a request to what the engine takes. Limits of the engine are checked by the engine."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

from vllm_omni.diffusion.catalog.registry import Guidance
from vllm_omni.entrypoints.openai.responses.encoding import ImageFormat
from vllm_omni.entrypoints.openai.schema.images import RANDOM_SEED, ImageGenerationRequest, ImageOptions
from vllm_omni.errors import InvalidRequestError, ModelNotFoundError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.inputs.images import InputImage

IGNORED_FIELDS_HEADER = "x-omni-ignored-fields"
_MAX_LISTED_FIELDS = 20
_MAX_NAME = 64
_NUM_RANDOM_SEEDS = 2**32


def check_model_name(model: str | None, served_names: Sequence[str]) -> None:
    """Raises ModelNotFoundError unless `model` is absent or one of the names of the model and of its adapters."""
    if model is not None and model not in served_names:
        raise ModelNotFoundError(
            f"The model {model[:_MAX_NAME]!r} does not exist; served: {', '.join(served_names)}", param="model"
        )


def parse_size(size: str) -> tuple[int | None, int | None]:
    """(height, width) of `WIDTHxHEIGHT`; (None, None) for `auto`, which is the model's own size."""
    if size == "auto":
        return None, None
    width, height = size.split("x")
    return int(height), int(width)


def _size_of(body: ImageOptions) -> tuple[int | None, int | None]:
    """(height, width), by whichever names: vllm-omni's clients send them apart."""
    height, width = parse_size(body.size)
    if body.height is None and body.width is None:
        return height, width
    if body.height is None or body.width is None:
        given = "height" if body.width is None else "width"
        raise InvalidRequestError(f"height and width go together, got {given} alone", param="size")
    if height is not None and (height, width) != (body.height, body.width):
        raise InvalidRequestError(
            f"size is {body.size}, but width and height say {body.width}x{body.height}: give one of them", param="size"
        )
    return body.height, body.width


def _num_outputs_of(body: ImageOptions) -> int:
    count = body.num_outputs_per_prompt
    if count is None:
        return body.n
    if "n" in body.model_fields_set and body.n != count:
        raise InvalidRequestError(f"n is {body.n}, but num_outputs_per_prompt {count}: give one of them", param="n")
    return count


def _seed_of(body: ImageOptions) -> int | None:
    """A random one where the client asks for that: None would be the server's default, which may be a fixed seed."""
    return secrets.randbelow(_NUM_RANDOM_SEEDS) if body.seed == RANDOM_SEED else body.seed


def parse_generation(
    body: ImageOptions, prompt: str, images: tuple[InputImage, ...], adapters: Collection[str]
) -> tuple[OmniPrompt, OmniDiffusionSamplingParams, ImageFormat]:
    """The prompt with the pictures to edit, how to make the picture and how to encode it.

    adapters: the names of those that are served.

    Raises InvalidRequestError for what is well-formed but not possible here.
    """
    height, width = _size_of(body)
    if body.background == "transparent":
        raise InvalidRequestError("background: this model makes opaque pictures only", param="background")
    if body.output_format == "png" and body.output_compression != 100:
        raise InvalidRequestError(
            "output_compression: png is lossless and takes only 100; choose jpeg or webp", param="output_compression"
        )
    num_previews = 0
    if isinstance(body, ImageGenerationRequest) and body.stream:
        if body.response_format == "url":
            raise InvalidRequestError(
                "response_format: a stream carries its pictures as b64_json", param="response_format"
            )
        num_previews = body.partial_images
    image_format = ImageFormat(body.output_format, body.output_compression)
    if height is not None and width is not None:
        image_format.check_size(height, width)
    params = OmniDiffusionSamplingParams(
        height=height,
        width=width,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        true_cfg_scale=body.true_cfg_scale,
        strength=body.strength,
        cfg_normalization=body.cfg_normalization,
        cfg_truncation=body.cfg_truncation,
        seed=_seed_of(body),
        num_outputs_per_prompt=_num_outputs_of(body),
        cache=body.cache,
        max_sequence_length=body.max_sequence_length,
        lora_request=_adapter(body, adapters),
        lora_scale=None if body.lora is None else body.lora.scale,
        priority=body.priority,
        output_type="np",
        num_previews=num_previews,
    )
    return OmniPrompt(prompt, body.negative_prompt, images), params, image_format


def _adapter(body: ImageOptions, adapters: Collection[str]) -> LoRARequest | None:
    """The one that `lora` names or, for clients that can choose no more than a model, `model`."""
    chosen = body.model if body.model in adapters else None
    name = chosen if body.lora is None else body.lora.name
    if chosen not in (None, name):
        raise InvalidRequestError(f"lora: names {name!r:.{_MAX_NAME}}, and model names {chosen!r}", param="lora")
    return None if name is None else LoRARequest(name)


def ignored_fields(body: ImageOptions, guidance: Guidance, has_guidance: bool) -> tuple[str, ...]:
    """Names of the fields that had no effect, as they may stand in a header and in a log line.

    These are unknown fields, and halves of a pair: guidance needs both a negative prompt and a scale. When there are
    many, the last entry is the number of those left out (`+3 more`).
    """
    names = list(body.model_extra or ())
    if isinstance(body, ImageGenerationRequest) and body.partial_images and not body.stream:
        names.append("partial_images")
    if not has_guidance:
        names += guidance.asked_by(body.negative_prompt, body)
    listed = [_printable(name) for name in names[:_MAX_LISTED_FIELDS]]
    if (num_left_out := len(names) - len(listed)) > 0:
        listed.append(f"+{num_left_out} more")
    return tuple(listed)


def ignored_fields_header(names: Sequence[str]) -> dict[str, str]:
    """`x-omni-ignored-fields` with the result of `ignored_fields`; {} for none."""
    return {IGNORED_FIELDS_HEADER: ",".join(names)} if names else {}


def _printable(name: str) -> str:
    """A client's field name as it may stand in a header."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "?" for c in name[:_MAX_NAME])
