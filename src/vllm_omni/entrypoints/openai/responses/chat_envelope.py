"""Fields that every chat completion and every chunk of it has."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from vllm_omni.entrypoints.openai.responses.events import frame
from vllm_omni.entrypoints.openai.schema.chat import ChatCompletionRequest, ChatUsage

DONE = frame(b"[DONE]")
"""Last event of a stream."""


@dataclass(frozen=True)
class ChatEnvelope:
    """Identity of one answer."""

    id: str
    created: int
    model: str
    include_usage: bool
    """Whether a stream ends with a chunk that has the usage."""

    @classmethod
    def to(cls, body: ChatCompletionRequest, served_name: str) -> ChatEnvelope:
        """An envelope for the answer to `body`. served_name: the model's, where `body` names none."""
        include_usage = bool((body.stream_options or {}).get("include_usage"))
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), body.model or served_name, include_usage)

    def completion(self, usage: ChatUsage) -> dict[str, Any]:
        """A completion without its choices."""
        return self._fields("chat.completion") | {"usage": usage.model_dump()}

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self._fields("chat.completion.chunk") | {"choices": list(choices)}

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: dict[str, Any]) -> bytes:
    """`value` as a server-sent event."""
    return frame(as_json(value))
