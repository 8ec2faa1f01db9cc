"""`POST /v1/chat/completions` for chat front ends: the same pictures in another envelope."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.openai.answers import Answer, AnswerStyle, json_around, usage
from vllm_omni.entrypoints.openai.chat_protocol import ChatCompletion, ChatCompletionRequest, ChatUsage
from vllm_omni.entrypoints.openai.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.images import ImageService
from vllm_omni.entrypoints.openai.protocol import json_request_body
from vllm_omni.entrypoints.openai.streaming import frame, frame_around, is_done
from vllm_omni.errors import InvalidRequestError
from vllm_omni.omni import OutputStream
from vllm_omni.outputs import OmniRequestOutput

CHAT_PATH = "/v1/chat/completions"
_URL = "<url>"
"""Stands where a picture goes."""


@dataclass(frozen=True)
class ChatAnswer:
    """A chat completion with a choice for each picture, or its chunks."""

    encoder: ImageEncoder
    style: AnswerStyle
    model: str
    include_usage: bool
    id: str
    created: int

    @classmethod
    def to(cls, body: ChatCompletionRequest, service: ImageService, style: AnswerStyle) -> ChatAnswer:
        model = body.model or service.settings.served_model_names[0]
        include_usage = bool((body.stream_options or {}).get("include_usage"))
        return cls(service.encoder, style, model, include_usage, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    async def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """Two chunks of each choice, once its picture is done: that, and its `finish_reason`.

        The picture is in `delta.images`, where front ends look for it: their `delta.content` is text, to be appended.
        """
        async for output in outputs:
            if output.finished:
                if self.include_usage:
                    yield _event(self._envelope("chat.completion.chunk") | {"choices": [], "usage": _usage(output)})
                yield frame(b"[DONE]")
                return
            if is_done(output):
                delta = {"role": "assistant", "content": "", "images": [{**_image_part(), "index": 0}]}
                yield await self._encoded(self._chunk(output, delta, None), output, 0, frame_around())
                yield _event(self._chunk(output, {}, "stop"))

    async def response(self, output: OmniRequestOutput) -> Response:
        def envelope(timings: dict[str, float]) -> dict[str, Any]:
            fields = self._envelope("chat.completion") | {"usage": _usage(output), "timings": timings}
            if self.style.safety_identifier:
                fields["safety_identifier"] = self.style.safety_identifier
            return fields

        message = {"role": "assistant", "content": [_image_part()]}
        choices = [
            self._encoded({"index": i, "finish_reason": "stop", "seed": seed, "message": message}, output, i)
            for i, seed in enumerate(output.seeds)
        ]
        return await json_around(choices, "choices", output, envelope)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, output: OmniRequestOutput, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": output.index, "finish_reason": finish_reason, "seed": output.seeds[0], "delta": delta}
        return self._envelope("chat.completion.chunk") | {"choices": [choice]}

    async def _encoded(
        self, value: dict[str, Any], output: OmniRequestOutput, index: int, around: tuple[bytes, bytes] = (b"", b"")
    ) -> bytes:
        """`value` as JSON between `around`; the output's picture of that index replaces its `_URL`."""
        image_format = self.style.image_format
        before, _, after = _json(value).rpartition(_URL.encode())
        before += b"data:%s;base64," % image_format.content_type.encode()
        return await self.encoder.base64(output.images[index], image_format, around[0] + before, after + around[1])


def _image_part() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": _URL}}


def _usage(output: OmniRequestOutput) -> dict[str, Any]:
    tokens = usage(output)
    return ChatUsage(
        prompt_tokens=tokens.input_tokens, completion_tokens=tokens.output_tokens, total_tokens=tokens.total_tokens
    ).model_dump()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(value: dict[str, Any]) -> bytes:
    return frame(_json(value))


async def complete(service: ImageService, request: Request) -> Response:
    """Raises RequestError, also for bodies that are wrong or too large."""
    service.check_makes_pictures()
    with service.uploads.budget.holding() as holding:
        body, prompt = await service.uploads.read_chat(request, holding)

        def answer_in(style: AnswerStyle) -> Answer:
            return ChatAnswer.to(body, service, style)

        try:
            return await service.run(body, prompt, request, holding, answer_in)
        except InvalidRequestError as error:
            if error.param != "prompt":
                raise
            raise InvalidRequestError(f"messages: {error}", param="messages") from error


def make_chat_router(service: ImageService) -> APIRouter:
    router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=ERROR_RESPONSES)
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

    @router.post(
        "/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": event}}}},
        openapi_extra={"requestBody": json_request_body(ChatCompletionRequest)},
    )
    async def completions(request: Request) -> Response:
        """Make pictures from the last user message, which may bring some to edit; chunks with `stream`."""
        return await complete(service, request)

    return router
