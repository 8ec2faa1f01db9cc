"""`POST /v1/chat/completions`: the same pictures and videos for chat front ends, in the form of a chat completion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.entrypoints.openai.requests.body_reader import BodyReader
from vllm_omni.entrypoints.openai.requests.chat_body import read_chat
from vllm_omni.entrypoints.openai.requests.input_pictures import PictureReader
from vllm_omni.entrypoints.openai.responses.chat import ChatAnswer, ChatEnvelope, empty_completion
from vllm_omni.entrypoints.openai.routes.picture_service import PictureService
from vllm_omni.entrypoints.openai.schema.chat import (
    ChatCompletion,
    ChatCompletionRequest,
    ChatRequest,
    VideoChatRequest,
)
from vllm_omni.entrypoints.openai.schema.examples import chat_example
from vllm_omni.entrypoints.openai.schema.images import json_request_body
from vllm_omni.errors import InvalidRequestError

if TYPE_CHECKING:  # its module imports databases and encoders of videos
    from vllm_omni.entrypoints.openai.routes.video_chat import VideoChat

CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class ChatService:
    """Answers chat completions."""

    pictures: PictureService
    bodies: BodyReader
    reader: PictureReader
    metrics: PrometheusObserver
    videos: VideoChat | None
    """Makes the answers of a model that makes videos; None: the model makes pictures."""

    async def complete(self, request: Request) -> Response:
        """Make pictures or videos from the last user message, or answer a text task with empty text.

        Raises RequestError or RequestValidationError; HTTPException (408, 413) for slow and for large bodies.
        """
        model = ChatCompletionRequest if self.videos is None else VideoChatRequest
        with self.pictures.budget.reserve() as reservation:
            finds_text_tasks = self.pictures.settings.chat_text_tasks == "empty"
            body, prompt = await read_chat(
                request, reservation, self.bodies, self.reader, model, finds_text_tasks=finds_text_tasks
            )
            envelope = ChatEnvelope.of(body, self.pictures.settings.served_model_names[0])
            if prompt is None:
                return self._empty(body, envelope, request)
            try:
                if isinstance(body, VideoChatRequest):
                    assert self.videos is not None
                    return await self.videos.answer(body, prompt, envelope, request, reservation)
                make_answer = partial(ChatAnswer, self.pictures.encoder, envelope=envelope)
                return await self.pictures.answer(body, prompt, make_answer, request, reservation)
            except InvalidRequestError as error:
                if error.param != "prompt":
                    raise
                raise InvalidRequestError(f"messages: {error}", param="messages") from error

    def _empty(self, body: ChatRequest, envelope: ChatEnvelope, request: Request) -> Response:
        self.pictures.names.check(body.model)
        ignored, headers = self.pictures.ignored_fields(body, request, has_guidance=True)
        self.metrics.on_text_task()
        num_choices = body.num_outputs_per_prompt or body.n
        return empty_completion(envelope, num_choices, body.stream, ignored, headers)


def make_chat_router(service: ChatService) -> APIRouter:
    router = APIRouter(prefix="/v1/chat", tags=["chat"], responses=ERROR_RESPONSES)
    pictures = service.pictures
    model = ChatCompletionRequest if service.videos is None else VideoChatRequest
    example = chat_example(pictures.settings.served_model_names[0], pictures.omni.info)
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

    @router.post(
        "/completions",
        summary="Make pictures or videos in a chat",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": event}}}},
        openapi_extra={"requestBody": json_request_body(model, example)},
    )
    async def completions(request: Request) -> Response:
        """Make pictures or videos from the last user message, which may bring pictures; chunks with `stream`."""
        return await service.complete(request)

    return router
