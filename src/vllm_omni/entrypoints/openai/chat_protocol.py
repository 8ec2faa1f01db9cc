"""The JSON of chat completions that answer with pictures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, WithJsonSchema

from vllm_omni.entrypoints.openai.echo import MAX_ECHO, echo
from vllm_omni.entrypoints.openai.protocol import ImageOptions, at_most
from vllm_omni.errors import InvalidRequestError

MAX_MESSAGES = 10_000
"""Of a conversation; more than a front end keeps."""
_MAX_MODALITIES = 8

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_IMAGE_URL = {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]}
_IMAGE_PART = {
    "type": "object",
    "properties": {"type": {"const": "image_url"}, "image_url": _IMAGE_URL},
    "required": ["type", "image_url"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [_TEXT_PART, _IMAGE_PART]}}]}
_ROLES = ["user", "assistant", "system", "developer", "tool", "function"]
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "properties": {"role": {"enum": _ROLES}, "content": _CONTENT},
        "required": ["role", "content"],
    },
}


class ChatCompletionRequest(ImageOptions):
    """Body of `POST /v1/chat/completions`, after `with_extra_body`."""

    messages: Annotated[
        list[dict[str, Any]], Field(min_length=1), FailFast(), at_most(MAX_MESSAGES), WithJsonSchema(_MESSAGES)
    ]
    """Only the last one of the role `user` is read: see `last_user_turn`."""
    stream_options: dict[str, Any] | None = None
    """`{"include_usage": true}`: a stream ends with its usage."""
    extra_body: dict[str, Any] | None = None
    """Means the same as its fields beside `messages`, where the SDK puts them."""

    # Accepted for compatibility: the answer is pictures and nothing else.
    modalities: Annotated[list[str], Field(max_length=_MAX_MODALITIES), at_most(_MAX_MODALITIES)] | None = None


def with_extra_body(body: Any) -> Any:
    """What `body` says with the fields of its `extra_body` beside the others; `null` is the same as absent.

    Raises InvalidRequestError for a field that has another value there.
    """
    if not isinstance(body, dict) or not isinstance(extra := body.get("extra_body"), dict):
        return body
    outside = {name: value for name, value in body.items() if name != "extra_body" and value is not None}
    inside = {name: value for name, value in extra.items() if value is not None}
    for name in outside.keys() & inside.keys():
        if not _is_same(outside[name], inside[name]):
            raise InvalidRequestError(
                f"{echo(name)} is {echo(outside[name])} and, in extra_body, {echo(inside[name])}: give it once",
                param=name[:MAX_ECHO],
            )
    return outside | inside


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except RecursionError:  # lists in lists, as deep as the parser takes them
        return False


class ChatUsage(BaseModel):
    """Tokens of the prompt and of its pictures, and latent patches of the answer's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ImageUrl(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: list[ImagePart]


class ChatChoice(BaseModel):
    index: int
    finish_reason: Literal["stop"]
    seed: int
    message: ChatMessage


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    usage: ChatUsage
    timings: dict[str, float]
    """As those of `ImagesResponse`."""
    safety_identifier: str | None = None
    choices: list[ChatChoice]
