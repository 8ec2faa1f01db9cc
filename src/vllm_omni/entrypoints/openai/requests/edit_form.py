"""Fields of the form of `POST /v1/images/edits`: limits of its parts, and the spellings that clients use."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS, check_num_images
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.requests.input_pictures import MAX_IMAGE_BYTES
from vllm_omni.entrypoints.openai.requests.multipart import Part
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest
from vllm_omni.errors import InvalidRequestError

MAX_FIELD_BYTES = 4 * MAX_PROMPT_CHARACTERS
"""A character takes at most 4 bytes in UTF-8."""
IMAGE_FIELD = re.compile(r"image(\[\d{0,3}\])?")
_NESTED_FIELD = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")
_UNSUPPORTED = ("mask", "markup")
_TEXT_FIELDS = ImageEditRequest.model_fields.keys() - {"images", *_UNSUPPORTED}
"""Fields that may also come as files, as `curl -F prompt=@prompt.txt` sends them."""
_MAX_NAME = 64


class FormLimits:
    """Limits of the parts of one form, asked for each part when its headers are read."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._num_images = 0

    def limit_of(self, part: Part) -> int:
        """Most bytes of `part`. Raises InvalidRequestError for too many pictures and for files in other fields."""
        if part.is_file and part.name in _UNSUPPORTED:
            raise _unsupported(part.name)
        if not IMAGE_FIELD.fullmatch(part.name):
            if part.is_file and part.name not in _TEXT_FIELDS:
                where = f"in {part.name[:_MAX_NAME]!r}" if part.name else "without a name"
                raise InvalidRequestError(
                    f"files go in image or image[], got one {where}", param=part.name[:_MAX_NAME] or None
                )
            return MAX_FIELD_BYTES
        self._num_images += 1
        check_num_images(self._num_images, self._info)
        return MAX_IMAGE_BYTES


def set_field(fields: dict[str, Any], part: Part) -> None:
    """Store the value of `part` in `fields`, as a nested object for `name[key]` and for `lora` as JSON.

    An empty part is absent, like null in JSON. Raises InvalidRequestError.
    """
    try:
        value = part.data.decode()
    except UnicodeDecodeError as error:
        name, kind = part.name[:_MAX_NAME], "a file that is none: pictures go in image or image[]"
        raise InvalidRequestError(
            f"{name} takes text in UTF-8, got {kind if part.is_file else quote(bytes(part.data[:_MAX_NAME]))}",
            param=name or None,
        ) from error
    if not value and part.name != "prompt":
        if part.name == "negative_prompt":
            fields[part.name] = value  # has a meaning: guidance needs a negative prompt, which may be empty
        return
    nested = _NESTED_FIELD.fullmatch(part.name)
    if part.name == "lora":
        fields[part.name] = _lora_fields(value)
    elif nested and isinstance(inner := fields.setdefault(nested[1], {}), dict):
        inner[nested[2]] = value
    else:
        fields[part.name] = value


def refuse_unsupported(names: Collection[str]) -> None:
    """Raise InvalidRequestError if `names`, the fields of a body, contain one that no model takes."""
    for name in _UNSUPPORTED:
        if name in names:
            raise _unsupported(name)


def _lora_fields(text: str) -> dict[str, Any]:
    """Fields of `lora` as JSON. Numbers stay text, as in `lora[key]`."""
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f'lora takes a JSON object such as {{"name": "ink", "scale": 0.8}}, got {quote(text)}', param="lora"
        )
    return {key: inner for key, inner in value.items() if inner is not None}


def _unsupported(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: no model here takes one; say in the prompt what to change", param=name)
