"""Bodies of `POST /v1/chat/completions`: the last user message is the prompt and brings the pictures to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.requests.body_reader import BodyReader, UploadReservation, validated
from vllm_omni.entrypoints.openai.requests.input_pictures import PictureReader
from vllm_omni.entrypoints.openai.schema.chat import (
    ChatCompletionRequest,
    ChatRequest,
    VideoChatRequest,
    with_extra_body,
)
from vllm_omni.errors import InvalidRequestError

TASK_OPENING = "### Task:"
"""Opening of Open WebUI's tasks: title, tags, follow-up questions, search queries, image prompt, autocompletion."""
OPENINGS = (
    TASK_OPENING,
    # Open WebUI: emoji of a voice call, merging the answers of several models.
    "Your task is to reflect the speaker's likely facial expression through a fitting emoji.",
    "You have been provided with a set of responses from various models to the latest user query:",
    # LibreChat: titles.
    "Provide a concise, 5-word-or-less title for the conversation",
    "Analyze this conversation and provide:\n1. The detected language of the conversation",
)
RETRIEVAL_OPENING = "Respond to the user query"
"""After `TASK_OPENING`: a user's own message, which Open WebUI wrapped in retrieved text. It is no text task."""
TOOLS_OPENING = "Available Tools:"
"""Opening of the system message with which Open WebUI chooses a tool; the user message has one of `QUERY_OPENINGS`."""
QUERY_OPENINGS = ("Query:", "History:")


@dataclass(frozen=True)
class UserMessage:
    """Text and picture URLs of a user message."""

    text: str
    urls: tuple[str, ...]

    def check_images(self, info: ModelInfo) -> None:
        """Raise InvalidRequestError for pictures that the model does not take, or for none where it needs some."""
        if self.urls and info.image_input is None:
            made = (
                "videos from text and takes no pictures" if info.makes_videos else "pictures from text and takes none"
            )
            raise _invalid(f"this model makes {made}: leave image_url parts out of the last user message")
        if not self.urls and info.needs_image:
            does = "makes videos from pictures" if info.makes_videos else "edits pictures"
            raise _invalid(f"this model {does} and got none: the last user message needs an image_url part")


async def read_chat(
    request: Request,
    reservation: UploadReservation,
    bodies: BodyReader,
    pictures: PictureReader,
    model: type[ChatCompletionRequest] | type[VideoChatRequest],
    *,
    finds_text_tasks: bool,
) -> tuple[ChatRequest, str | None]:
    """The body of a chat and its prompt, or None for a text task. The pictures of the prompt go into `reservation`.

    model: fields of the body. finds_text_tasks: whether text tasks of front ends are told apart: see `is_text_task`.
    Raises as `PictureBodyReader.read`.
    """

    def convert(value: Any) -> tuple[ChatRequest, UserMessage | None]:
        body = validated(lambda: model.model_validate(with_extra_body(value)))
        is_task = finds_text_tasks and is_text_task(body.messages)
        return body, None if is_task else last_user_message(body.messages)

    body, message = await bodies.json(request, reservation, convert)
    if message is None:
        return body, None
    message.check_images(pictures.info)
    await pictures.read_urls(request, message.urls, reservation)
    return body, message.text


def last_user_message(messages: Sequence[Mapping[str, Any]]) -> UserMessage:
    """The last message of the role `user`; its text parts are lines of the prompt.

    System messages and earlier messages are not read, and their pictures are not edited. Raises InvalidRequestError.
    """
    message = next((message for message in reversed(messages) if message.get("role") == "user"), None)
    if message is None:
        raise _invalid("one must have the role user; its text is the prompt")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _invalid(f"the content of a user message is text or a list of parts, got {quote(content)}")
    texts: list[str] = []
    urls: list[str] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                urls.append(url)
            case _:
                raise _invalid(
                    'parts of a user message are {"type": "text", "text": ...} and '
                    f'{{"type": "image_url", "image_url": {{"url": ...}}}}, got {quote(part)}'
                )
    prompt = "\n".join(texts)
    if not prompt.strip():
        raise _invalid("the last user message has no text; its text is the prompt")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise _invalid(f"the prompt has {len(prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted")
    return UserMessage(prompt, tuple(urls))


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"messages: {message}", param="messages")


def is_text_task(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a front end sent `messages` by itself to get text, such as a title. One with pictures is a user's own.

    Front ends send such requests to the same model after each answer; a model that makes pictures would make one for
    each. The openings are those of the front ends' default prompts.
    """
    text = _text_of_last(messages, "user")
    if text.startswith(TASK_OPENING):
        return not text.removeprefix(TASK_OPENING).lstrip().startswith(RETRIEVAL_OPENING)
    if text.startswith(OPENINGS):
        return True
    return text.startswith(QUERY_OPENINGS) and _text_of_last(messages, "system").startswith(TOOLS_OPENING)


def _text_of_last(messages: Sequence[Mapping[str, Any]], role: str) -> str:
    """Text of the last message of `role`; empty if there is none, and for a message with several parts."""
    content = next((message.get("content") for message in reversed(messages) if message.get("role") == role), None)
    match content:
        case str(text) | [{"type": "text", "text": str(text)}]:
            return text.lstrip()
        case _:
            return ""
