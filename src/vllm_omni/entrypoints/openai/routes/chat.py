"""`POST /v1/chat/completions` for chat front ends: the same pictures in another envelope."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.responses.chat_envelope import DONE, ChatEnvelope, as_json, event
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.responses.events import frame_around, is_done
from vllm_omni.entrypoints.openai.responses.images import Answer, AnswerStyle, json_around, usage
from vllm_omni.entrypoints.openai.routes.images import ImageService
from vllm_omni.entrypoints.openai.routes.text_tasks import empty_completion, is_text_task
from vllm_omni.entrypoints.openai.schema.chat import ChatCompletion, ChatCompletionRequest, ChatUsage
from vllm_omni.entrypoints.openai.schema.examples import chat_example
from vllm_omni.entrypoints.openai.schema.images import json_request_body
from vllm_omni.errors import InvalidRequestError
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

CHAT_PATH = "/v1/chat/completions"
_URL = "<url>"
"""Stands where a picture goes."""


@dataclass(frozen=True)
class ChatAnswer:
    """A chat completion with a choice for each picture, or its chunks."""

    encoder: ImageEncoder
    style: AnswerStyle
    envelope: ChatEnvelope

    async def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """Two chunks for each choice, once its picture is done: the picture, and the `finish_reason`.

        The picture is in `delta.images`, where front ends look for it: their `delta.content` is text, to be appended.
        """
        ignored = {"ignored_fields": self.style.ignored_fields}
        async for output in outputs:
            if output.finished:
                if self.envelope.include_usage:
                    yield event(self.envelope.chunk() | {"usage": _usage(output).model_dump()} | ignored)
                yield DONE
                return
            if is_done(output):
                yield await self._encoded(self._chunk(output, _picture_message(), None), output, 0, frame_around())
                yield event(self._chunk(output, {}, "stop") | ignored)

    async def response(self, output: OmniRequestOutput) -> Response:
        def envelope(timings: dict[str, float]) -> dict[str, Any]:
            fields = self.envelope.completion(_usage(output)) | {"timings": timings}
            if self.style.safety_identifier:
                fields["safety_identifier"] = self.style.safety_identifier
            return fields | {"ignored_fields": self.style.ignored_fields}

        choices = [
            self._encoded({"index": i, "finish_reason": "stop", "seed": seed, "message": _picture_message()}, output, i)
            for i, seed in enumerate(output.seeds)
        ]
        return await json_around(choices, "choices", output, envelope)

    def _chunk(self, output: OmniRequestOutput, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return self.envelope.chunk(
            {"index": output.index, "finish_reason": finish_reason, "seed": output.seeds[0], "delta": delta}
        )

    async def _encoded(
        self, value: dict[str, Any], output: OmniRequestOutput, index: int, around: tuple[bytes, bytes] = (b"", b"")
    ) -> bytes:
        """`value` as JSON between `around`; the output's picture of that index replaces its `_URL`."""
        image_format = self.style.image_format
        before, _, after = as_json(value).rpartition(_URL.encode())
        before += b"data:%s;base64," % image_format.content_type.encode()
        return await self.encoder.base64(output.images[index], image_format, around[0] + before, after + around[1])


def _picture_message() -> dict[str, Any]:
    """A message, or the delta of one, with a picture. OpenAI's `content` is a string, and clients rely on that."""
    picture = {"type": "image_url", "image_url": {"url": _URL}, "index": 0}
    return {"role": "assistant", "content": "", "images": [picture]}


def _usage(output: OmniRequestOutput) -> ChatUsage:
    tokens = usage(output)
    return ChatUsage(
        prompt_tokens=tokens.input_tokens, completion_tokens=tokens.output_tokens, total_tokens=tokens.total_tokens
    )


@dataclass(frozen=True)
class ChatService:
    """Turns chat requests into answers."""

    images: ImageService
    on_text_task: Callable[[], None]
    """Called for each text task that is answered with empty text."""

    async def complete(self, request: Request) -> Response:
        """Raises RequestError, also for bodies that are wrong or too large."""
        service = self.images
        service.check_makes_pictures()
        is_answered_empty = is_text_task if service.settings.chat_text_tasks == "empty" else lambda _: False
        with service.uploads.budget.reserve() as reservation:
            body, prompt = await service.uploads.read_chat(request, reservation, is_answered_empty)
            envelope = ChatEnvelope.to(body, service.settings.served_model_names[0])
            if prompt is None:
                return self._empty(body, envelope, request)

            def answer_in(style: AnswerStyle) -> Answer:
                return ChatAnswer(service.encoder, style, envelope)

            try:
                return await service.run(body, prompt, request, reservation, answer_in)
            except InvalidRequestError as error:
                if error.param != "prompt":
                    raise
                raise InvalidRequestError(f"messages: {error}", param="messages") from error

    def _empty(self, body: ChatCompletionRequest, envelope: ChatEnvelope, request: Request) -> Response:
        self.images.check_model_name(body)
        ignored, headers = self.images.ignored_fields(body, request, has_guidance=True)
        self.on_text_task()
        num_choices = body.num_outputs_per_prompt or body.n
        return empty_completion(envelope, num_choices, body.stream, ignored, headers)


def make_chat_router(service: ChatService) -> APIRouter:
    router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=ERROR_RESPONSES)
    images = service.images
    example = chat_example(images.settings.served_model_names[0], images.omni.info)
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

    @router.post(
        "/completions",
        summary="Make pictures in a chat",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": event}}}},
        openapi_extra={"requestBody": json_request_body(ChatCompletionRequest, example)},
        include_in_schema=not images.omni.info.makes_videos,
    )
    async def completions(request: Request) -> Response:
        """Make pictures from the last user message, which may bring some to edit; chunks with `stream`."""
        return await service.complete(request)

    return router
