"""What of a conversation makes the picture: the last user message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.catalog.registry import ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.errors import InvalidRequestError


@dataclass(frozen=True)
class UserMessage:
    """A user's message: its text, and the URLs of its pictures."""

    text: str
    urls: tuple[str, ...]

    def check_images(self, info: ModelInfo) -> None:
        """Raises InvalidRequestError where the model takes no pictures and there are some, or the other way round."""
        if self.urls and info.image_input is None:
            raise _invalid(
                "this model makes pictures from text and takes none: leave image_url parts out of the last user message"
            )
        if not self.urls and info.image_input is not None and info.image_input.min_images:
            raise _invalid("this model edits pictures and got none: the last user message needs an image_url part")


def last_user_message(messages: Sequence[Mapping[str, Any]]) -> UserMessage:
    """The last message of the role `user`; its text parts are lines of the prompt.

    System messages and earlier turns are not looked at, and no picture of theirs is edited.
    Raises InvalidRequestError.
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
