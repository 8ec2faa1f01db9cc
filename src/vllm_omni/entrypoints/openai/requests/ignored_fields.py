"""Fields of a body that have no effect, which the response names."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_omni.diffusion.catalog.model_info import Guidance
from vllm_omni.entrypoints.openai.schema.images import ImageGenerationRequest, ImageOptions

IGNORED_FIELDS_HEADER = "x-omni-ignored-fields"
_MAX_LISTED_FIELDS = 20
_MAX_NAME = 64


def ignored_fields(body: ImageOptions, guidance: Guidance, has_guidance: bool) -> tuple[str, ...]:
    """Names of the fields of `body` that have no effect, safe for a header and a log line.

    They are unknown fields, and one half of a pair: guidance needs both a negative prompt and a scale. If there are
    many, the last entry is the number of the omitted names (`+3 more`).
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
    """The header `x-omni-ignored-fields` with `names`; {} if there are none."""
    return {IGNORED_FIELDS_HEADER: ",".join(names)} if names else {}


def _printable(name: str) -> str:
    """The beginning of a client's field name with characters that a header can hold."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "?" for c in name[:_MAX_NAME])
