"""Text tasks of chat front ends, which this server answers with empty text.

After each answer, front ends send the same model requests of their own: write a title, tags, follow-up questions. A
model that makes pictures would make one for each. The openings below are those of the front ends' default prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.openai.responses.chat_envelope import DONE, ChatEnvelope, event
from vllm_omni.entrypoints.openai.schema.chat import ChatUsage

TASK_OPENING = "### Task:"
"""Open WebUI: title, tags, follow-up questions, search queries, image prompt, autocompletion."""
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
"""After `TASK_OPENING`: a person's message that Open WebUI wrapped in retrieved text. Its answer is awaited."""
TOOLS_OPENING = "Available Tools:"
"""Open WebUI's choice of a tool is a system message that begins so, and a user message of `QUERY_OPENINGS`."""
QUERY_OPENINGS = ("Query:", "History:")


def is_text_task(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a front end sent `messages` by itself to get text. Messages with pictures come from persons."""
    text = _text_of_last(messages, "user")
    if text.startswith(TASK_OPENING):
        return not text.removeprefix(TASK_OPENING).lstrip().startswith(RETRIEVAL_OPENING)
    if text.startswith(OPENINGS):
        return True
    return text.startswith(QUERY_OPENINGS) and _text_of_last(messages, "system").startswith(TOOLS_OPENING)


def _text_of_last(messages: Sequence[Mapping[str, Any]], role: str) -> str:
    """The text of the last message of `role`; empty for none, and for a message that has more than one text."""
    content = next((message.get("content") for message in reversed(messages) if message.get("role") == role), None)
    match content:
        case str(text) | [{"type": "text", "text": str(text)}]:
            return text.lstrip()
        case _:
            return ""


def empty_completion(
    envelope: ChatEnvelope, num_choices: int, stream: bool, ignored_fields: Sequence[str], headers: Mapping[str, str]
) -> Response:
    """A chat completion without text, or its chunks."""
    usage = ChatUsage(prompt_tokens=0, completion_tokens=0, total_tokens=0)
    ignored = {"ignored_fields": list(ignored_fields)}
    if not stream:
        message = {"role": "assistant", "content": ""}
        choices = [{"index": i, "finish_reason": "stop", "message": message} for i in range(num_choices)]
        return JSONResponse(envelope.completion(usage) | ignored | {"choices": choices}, headers=headers)
    events = []
    for i in range(num_choices):
        delta = {"role": "assistant", "content": ""}
        events.append(event(envelope.chunk({"index": i, "finish_reason": None, "delta": delta})))
        events.append(event(envelope.chunk({"index": i, "finish_reason": "stop", "delta": {}}) | ignored))
    if envelope.include_usage:
        events.append(event(envelope.chunk() | {"usage": usage.model_dump()} | ignored))
    return Response(b"".join([*events, DONE]), media_type="text/event-stream", headers=headers)
