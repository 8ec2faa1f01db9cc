"""Request and response bodies of chat completions with pictures or videos."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, WithJsonSchema

from vllm_omni.entrypoints.openai.quotes import MAX_QUOTE, quote
from vllm_omni.entrypoints.openai.schema.images import (
    ImageOptions,
    RequestBody,
    StreamOptions,
    at_most,
    without_absent,
)
from vllm_omni.entrypoints.openai.schema.videos import VideoOptions
from vllm_omni.errors import InvalidRequestError

MAX_MESSAGES = 10_000
"""Most messages of a conversation: more than a front end keeps."""
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


class ChatMessages(RequestBody):
    """Fields of every chat."""

    messages: Annotated[
        list[dict[str, Any]], Field(min_length=1), FailFast(), at_most(MAX_MESSAGES), WithJsonSchema(_MESSAGES)
    ]
    """The last message of the role `user` is the prompt; the others are not read."""
    stream_options: dict[str, Any] | None = None
    """`{"include_usage": true}`: the last chunk of a stream has the usage."""
    extra_body: dict[str, Any] | None = None
    """Further fields; they have the same meaning as beside `messages`, where the OpenAI SDK puts them."""

    # Accepted for compatibility: the answer is pictures or videos and nothing else.
    modalities: Annotated[list[str], Field(max_length=_MAX_MODALITIES), at_most(_MAX_MODALITIES)] | None = None


class ChatCompletionRequest(ChatMessages, ImageOptions):
    """Body of `POST /v1/chat/completions` with a model that makes pictures."""


class VideoChatRequest(ChatMessages, VideoOptions, StreamOptions):
    """Body of `POST /v1/chat/completions` with a model that makes videos."""


ChatRequest = ChatCompletionRequest | VideoChatRequest


def with_extra_body(body: Any) -> Any:
    """`body` merged with the fields of its `extra_body`; `null` and `""` mean that a field is absent.

    Raises InvalidRequestError for a field that has different values in both.
    """
    if not isinstance(body, dict) or not isinstance(extra := body.get("extra_body"), dict):
        return body
    keep_empty = ChatCompletionRequest.keep_empty()  # the same as those of a video's
    inside, outside = without_absent(extra, keep_empty), without_absent(body, keep_empty)
    del outside["extra_body"]
    for name in outside.keys() & inside.keys():
        if not _is_same(outside[name], inside[name]):
            raise InvalidRequestError(
                f"{quote(name)} is {quote(outside[name])} and, in extra_body, {quote(inside[name])}: give it once",
                param=name[:MAX_QUOTE],
            )
    return outside | inside


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except RecursionError:  # lists in lists, as deep as the parser takes them
        return False


class ChatUsage(BaseModel):
    """Number of tokens of the prompt and its pictures, and of latent patches of the finished pictures."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ImageUrl(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl
    index: int


class VideoUrl(BaseModel):
    url: str
    """A `data:` URL; of a file above 20 MB a link to the content of a video job."""


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: VideoUrl
    index: int


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: Literal[""]
    images: list[ImagePart] | None = None
    """One picture; absent in the answer of a model that makes videos, and to a text task of a front end."""
    videos: list[VideoPart] | None = None
    """One video; absent in the answer of a model that makes pictures, and to a text task of a front end."""


class ChatChoice(BaseModel):
    index: int
    finish_reason: Literal["stop"]
    seed: int | None = None
    message: ChatMessage


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    usage: ChatUsage
    timings: dict[str, float | bool] | None = None
    """Timings as in `ImagesResponse`; absent in the answer to a text task of a front end."""
    safety_identifier: str | None = None
    ignored_fields: list[str]
    """Fields of the request that had no effect."""
    choices: list[ChatChoice]
