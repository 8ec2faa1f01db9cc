"""Sampling parameters and file format from the fields of a body, and the fields without effect.

The engine checks its own limits later.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.entrypoints.openai.requests.served_names import ServedNames
from vllm_omni.entrypoints.openai.responses.encoding import ImageFormat
from vllm_omni.entrypoints.openai.schema.images import (
    RANDOM_SEED,
    GenerationOptions,
    ImageGenerationRequest,
    ImageOptions,
    LoRAField,
    RequestBody,
)
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import PARAMETERS, LoRARequest, OmniDiffusionSamplingParams

_MAX_NAME = 64
_NUM_RANDOM_SEEDS = 2**32
IGNORED_FIELDS_HEADER = "x-omni-ignored-fields"
_MAX_LISTED_FIELDS = 20


def parse_size(size: str) -> tuple[int | None, int | None]:
    """(height, width) of `WIDTHxHEIGHT`; (None, None) for `auto`, the model's own size."""
    if size == "auto":
        return None, None
    width, height = size.split("x")
    return int(height), int(width)


def _size_of(body: GenerationOptions) -> tuple[int | None, int | None]:
    """(height, width) from `size`, or from `height` and `width`, which clients of vllm-omni send instead.

    Raises InvalidRequestError if they contradict each other or one is missing.
    """
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


def _num_outputs_of(body: GenerationOptions) -> int:
    count = body.num_outputs_per_prompt
    if count is None:
        return body.n
    if "n" in body.model_fields_set and body.n != count:
        raise InvalidRequestError(f"n is {body.n}, but num_outputs_per_prompt {count}: give one of them", param="n")
    return count


def sampling_params(body: GenerationOptions, served: ServedNames, num_previews: int = 0) -> OmniDiffusionSamplingParams:
    """Sampling parameters of the pictures or videos that `body` asks for.

    served: names that `model` may give; num_previews: previews of each output.

    Raises InvalidRequestError for values that are well-formed but not available here.
    """
    height, width = _size_of(body)
    if body.background == "transparent":
        raise InvalidRequestError("background: this model's output is opaque", param="background")
    same = {name: getattr(body, name) for name in PARAMETERS if name in type(body).model_fields}
    different = {
        "height": height,
        "width": width,
        # A random seed is drawn here: None is the server's default, which may be fixed.
        "seed": secrets.randbelow(_NUM_RANDOM_SEEDS) if body.seed == RANDOM_SEED else body.seed,
        "num_outputs_per_prompt": _num_outputs_of(body),
        "shift": body.shift,
        **_adapters(body, served),
        "output_type": "np",
        "num_previews": num_previews,
    }
    return OmniDiffusionSamplingParams(**{**same, **different})


def parse_parameters(body: ImageOptions, served: ServedNames) -> tuple[OmniDiffusionSamplingParams, ImageFormat]:
    """Sampling parameters of the pictures, and the format of their files. served, errors: see `sampling_params`."""
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
    params = sampling_params(body, served, num_previews)
    if params.height is not None and params.width is not None:
        image_format.check_size(params.height, params.width)
    return params, image_format


def _adapters(body: GenerationOptions, served: ServedNames) -> dict[str, Any]:
    """Parameters for the adapters that `lora` names or, for clients that can only choose a model, `model`."""
    given = [body.lora] if isinstance(body.lora, LoRAField) else body.lora
    chosen = None if (adapter := served.adapter(body.model)) is None else adapter.name
    if given is None:
        return {"lora_request": None if chosen is None else LoRARequest(chosen)}
    names = [lora.name for lora in given]
    if chosen is not None and chosen not in names:
        listed = ", ".join(f"{name!r:.{_MAX_NAME}}" for name in names) or "none"
        raise InvalidRequestError(f"lora: names {listed}, and model names {chosen!r}", param="lora")
    if isinstance(body.lora, LoRAField):
        return {"lora_request": LoRARequest(body.lora.name), "lora_scale": body.lora.scale}
    if not given:
        return {"lora_request": []}
    scales = [1.0 if lora.scale is None else lora.scale for lora in given]
    return {"lora_request": [LoRARequest(name) for name in names], "lora_scale": scales}


def ignored_fields(body: GenerationOptions, guidance: Guidance, has_guidance: bool) -> tuple[str, ...]:
    """Names of the fields of `body` that have no effect, safe for a header and a log line.

    They are unknown fields, and one half of a pair: guidance needs both a negative prompt and a scale. If there are
    many, the last entry is the number of the omitted names (`+3 more`).
    """
    names = list(body.model_extra or ())
    if isinstance(body, ImageGenerationRequest) and body.partial_images and not body.stream:
        names.append("partial_images")
    if not has_guidance:
        names += guidance.asked_by(body.negative_prompt, body)
    return _listed(names)


def unknown_fields(body: RequestBody) -> tuple[str, ...]:
    """Names of the unknown fields of `body`, in the form of `ignored_fields`."""
    return _listed(list(body.model_extra or ()))


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    listed = [_printable(name) for name in names[:_MAX_LISTED_FIELDS]]
    if (num_left_out := len(names) - len(listed)) > 0:
        listed.append(f"+{num_left_out} more")
    return tuple(listed)


def _printable(name: str) -> str:
    """The beginning of a client's field name with characters that a header can hold."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "?" for c in name[:_MAX_NAME])
