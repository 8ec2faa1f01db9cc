"""Recognition of text tasks: requests that a chat front end sends by itself, such as "write a title".

Front ends send them to the same model after each answer. A model that makes pictures would make one for each, so the
server answers with empty text. The openings below are those of the front ends' default prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def is_text_task(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a front end sent `messages` by itself to get text. A message with pictures is always a user's own."""
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
