"""Answers of `/v1/chat/completions`: a chat completion with a choice for each picture, or its chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.openai.responses.answers import (
    ResponseOptions,
    encode_all,
    frame,
    frame_around,
    is_finished_picture,
    json_with_list,
    last_output,
    usage,
)
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.schema.chat import ChatRequest, ChatUsage
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

URL_PLACEHOLDER = b"<url>"
"""Placeholder of the URL of a picture or video, replaced in the encoded JSON."""
DONE = frame(b"[DONE]")
"""Last event of a stream."""


@dataclass(frozen=True)
class ChatEnvelope:
    """Fields that identify one answer."""

    id: str
    created: int
    model: str
    include_usage: bool
    """Whether a stream ends with a chunk that has the usage."""

    @classmethod
    def of(cls, body: ChatRequest, served_name: str) -> ChatEnvelope:
        """Envelope of the answer to `body`. served_name: name of the model if `body` has none."""
        include_usage = bool((body.stream_options or {}).get("include_usage"))
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), body.model or served_name, include_usage)

    def completion(self, usage: ChatUsage) -> dict[str, Any]:
        """A completion without its choices."""
        return self._fields("chat.completion") | {"usage": usage.model_dump()}

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self._fields("chat.completion.chunk") | {"choices": list(choices)}

    def output_chunk(
        self, output: OmniRequestOutput, delta: dict[str, Any], finish_reason: str | None
    ) -> dict[str, Any]:
        """A chunk about one output of the request."""
        return self.chunk(
            {"index": output.index, "finish_reason": finish_reason, "seed": output.seeds[0], "delta": delta}
        )

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class ChatAnswer:
    """An `Answer` in the form of OpenAI's chat API."""

    encoder: ImageEncoder
    options: ResponseOptions
    envelope: ChatEnvelope

    async def response(self, outputs: OutputStream) -> Response:
        output = await last_output(outputs)
        choices = [self._encoded(choice(i, seed, "image"), output, i) for i, seed in enumerate(output.seeds)]
        items, timings = await encode_all(choices, output.timings)
        fields = self.envelope.completion(chat_usage(output)) | {"timings": timings} | self.options.identifier_fields()
        return json_with_list(fields | {"ignored_fields": self.options.ignored_fields}, "choices", items)

    async def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """Two chunks for each finished picture: one with the picture, one with the `finish_reason`.

        The picture is in `delta.images`, where front ends look for it: they append `delta.content` to their text.
        """
        ignored = {"ignored_fields": self.options.ignored_fields}
        async for output in outputs:
            if output.finished:
                if self.envelope.include_usage:
                    yield event(self.envelope.chunk() | {"usage": chat_usage(output).model_dump()} | ignored)
                yield DONE
                return
            if is_finished_picture(output):
                chunk = self.envelope.output_chunk(output, media_message("image"), None)
                yield await self._encoded(chunk, output, 0, frame_around())
                yield event(self.envelope.output_chunk(output, {}, "stop") | ignored)

    async def _encoded(
        self, value: dict[str, Any], output: OmniRequestOutput, index: int, around: tuple[bytes, bytes] = (b"", b"")
    ) -> bytes:
        """`value` as JSON between `around`; picture `index` of the output replaces `URL_PLACEHOLDER`."""
        image_format = self.options.image_format
        before, _, after = as_json(value).rpartition(URL_PLACEHOLDER)
        before += b"data:%s;base64," % image_format.content_type.encode()
        return await self.encoder.base64(output.images[index], image_format, around[0] + before, after + around[1])


def choice(index: int, seed: int, kind: Literal["image", "video"]) -> dict[str, Any]:
    """A choice of a completion, whose message is `media_message`."""
    return {"index": index, "finish_reason": "stop", "seed": seed, "message": media_message(kind)}


def media_message(kind: Literal["image", "video"]) -> dict[str, Any]:
    """A message, or the delta of one, with a picture or video whose URL is `URL_PLACEHOLDER`.

    Clients rely on `content` being a string, as OpenAI has it.
    """
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": URL_PLACEHOLDER.decode()}, "index": 0}
    return {"role": "assistant", "content": "", f"{kind}s": [part]}


def chat_usage(output: OmniRequestOutput) -> ChatUsage:
    """Usage of a request, from its result."""
    tokens = usage(output)
    return ChatUsage(
        prompt_tokens=tokens.input_tokens, completion_tokens=tokens.output_tokens, total_tokens=tokens.total_tokens
    )


def empty_completion(
    envelope: ChatEnvelope, num_choices: int, stream: bool, ignored_fields: Sequence[str], headers: Mapping[str, str]
) -> Response:
    """Answer to a text task: a chat completion with empty text, or its chunks."""
    usage = ChatUsage(prompt_tokens=0, completion_tokens=0, total_tokens=0)
    ignored = {"ignored_fields": list(ignored_fields)}
    message = {"role": "assistant", "content": ""}
    if not stream:
        choices = [{"index": i, "finish_reason": "stop", "message": message} for i in range(num_choices)]
        return JSONResponse(envelope.completion(usage) | ignored | {"choices": choices}, headers=headers)
    chunks = []
    for i in range(num_choices):
        chunks.append(envelope.chunk({"index": i, "finish_reason": None, "delta": message}))
        chunks.append(envelope.chunk({"index": i, "finish_reason": "stop", "delta": {}}) | ignored)
    if envelope.include_usage:
        chunks.append(envelope.chunk() | {"usage": usage.model_dump()} | ignored)
    return Response(b"".join([*map(event, chunks), DONE]), media_type="text/event-stream", headers=headers)


def as_json(value: dict[str, Any]) -> bytes:
    """`value` as JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: dict[str, Any]) -> bytes:
    """`value` as a server-sent event."""
    return frame(as_json(value))
