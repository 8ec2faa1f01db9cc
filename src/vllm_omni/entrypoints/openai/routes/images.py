"""The routes under /v1/images."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.middlewares.arrivals import log_arrival
from vllm_omni.entrypoints.openai.requests.parsing import (
    check_model_name,
    ignored_fields,
    ignored_fields_header,
    parse_generation,
)
from vllm_omni.entrypoints.openai.requests.prompt_checks import Resolver
from vllm_omni.entrypoints.openai.requests.upload_budget import Holding
from vllm_omni.entrypoints.openai.requests.uploads import UploadReader
from vllm_omni.entrypoints.openai.responses.disconnect import unless_disconnected
from vllm_omni.entrypoints.openai.responses.encoding import CONTENT_TYPES, ImageEncoder
from vllm_omni.entrypoints.openai.responses.events import ImageEventStream, image_events
from vllm_omni.entrypoints.openai.responses.images import Answer, AnswerStyle, base64_items, images_response, url_items
from vllm_omni.entrypoints.openai.responses.stored_files import FileStore
from vllm_omni.entrypoints.openai.schema.examples import edit_example, edit_form_example, generation_example
from vllm_omni.entrypoints.openai.schema.images import (
    MAX_INPUT_IMAGES,
    ImageEditRequest,
    ImageGenerationRequest,
    ImageOptions,
    ImagesResponse,
    body_schema,
    json_request_body,
)
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.errors import InvalidRequestError
from vllm_omni.jobs import OutputStream
from vllm_omni.omni import AsyncOmni
from vllm_omni.outputs import OmniRequestOutput

logger = logging.getLogger(__name__)

FILE_ROUTE = "image_file"
EDITS_PATH = "/v1/images/edits"
GENERATIONS_PATH = "/v1/images/generations"


@dataclass(frozen=True)
class ImagesAnswer:
    """OpenAI's image events, or its list of pictures."""

    encoder: ImageEncoder
    style: AnswerStyle
    encode_item: Callable[[np.ndarray, int], Awaitable[bytes]]

    def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        return image_events(outputs, self.style, self.encoder)

    async def response(self, output: OmniRequestOutput) -> Response:
        return await images_response(output, self.style, self.encode_item)


@dataclass(frozen=True)
class ImageService:
    """Turns image requests into answers."""

    omni: AsyncOmni
    settings: ServerSettings
    encoder: ImageEncoder
    files: FileStore
    resolver: Resolver
    uploads: UploadReader

    async def create(self, request: Request) -> Response:
        """`generate` from a prompt. Raises RequestError, also for bodies that are wrong, too large or too slow."""
        self.check_makes_pictures()
        if (images := self.omni.info.image_input) is not None and images.min_images:
            raise InvalidRequestError("The served model edits pictures: use POST /v1/images/edits.", param="image")
        with self.uploads.budget.holding() as holding:
            body = await self.uploads.read_json(request, holding, ImageGenerationRequest)
            return await self.generate(body, request, holding)

    async def edit(self, request: Request) -> Response:
        """`generate` from pictures. Raises RequestError, also for bodies that are wrong or too large."""
        self.check_makes_pictures()
        if (images := self.omni.info.image_input) is None:  # before megabytes are read
            raise InvalidRequestError(
                "The served model makes pictures from text and edits none: use POST /v1/images/generations.",
                param="model",
            )
        with self.uploads.budget.holding() as holding:
            body = await self.uploads.read(request, holding)
            if not holding.images:
                elsewhere = "" if images.min_images else "; without one use POST /v1/images/generations"
                raise InvalidRequestError(
                    "image is required: files of that name in a form, or "
                    f'"images": [{{"image_url": "data:image/png;base64,..."}}] in JSON{elsewhere}',
                    param="image",
                )
            return await self.generate(body, request, holding)

    def check_makes_pictures(self) -> None:
        """Raises InvalidRequestError where the model makes videos."""
        if self.omni.info.makes_videos:
            raise InvalidRequestError(
                "The served model makes videos, which are made offline only yet, by vllm_omni.Omni: this server has no "
                "route for them.",
                param="model",
            )

    def check_model_name(self, body: ImageOptions) -> None:
        """Raises ModelNotFoundError unless the served model or one of its adapters is asked for."""
        check_model_name(body.model, (*self.settings.served_model_names, *self.omni.config.lora_modules))

    def ignored_fields(
        self, body: ImageOptions, request: Request, has_guidance: bool
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        """Names of the fields of `body` that had no effect, for the answer's body, and the header; logs them."""
        names = ignored_fields(body, self.omni.info.guidance, has_guidance)
        if names:
            logger.info("%s: ignored fields: %s", request.url.path, ", ".join(names))
        return names, ignored_fields_header(names)

    async def generate(self, body: ImageGenerationRequest, request: Request, holding: Holding) -> Response:
        """`holding`: see `run`. Raises RequestError before anything runs, or when the engine fails on it."""

        response_format = body.response_format or self.settings.default_response_format

        def answer_in(style: AnswerStyle) -> Answer:
            if response_format == "url":
                encode_item = url_items(self.encoder, self.files, style, url_of)
            else:
                encode_item = base64_items(self.encoder, style)
            return ImagesAnswer(self.encoder, style, encode_item)

        def url_of(file_id: str) -> str:
            return str(request.url_for(FILE_ROUTE, file_id=file_id))

        return await self.run(body, body.prompt, request, holding, answer_in)

    async def run(
        self,
        body: ImageOptions,
        prompt: str,
        request: Request,
        holding: Holding,
        answer_in: Callable[[AnswerStyle], Answer],
    ) -> Response:
        """The way of every request to its answer. Raises RequestError.

        `holding`: its upload and the pictures to edit. It moves into a stream, which ends long after this returns.
        """
        self.check_makes_pictures()
        self.check_model_name(body)
        adapters = self.omni.config.lora_modules
        omni_prompt, params, image_format = parse_generation(body, prompt, holding.images, adapters)
        if holding.images:
            omni_prompt = await self.uploads.fitted(partial(self.omni.fit_images, omni_prompt, params), holding)
        job = await self.resolver.resolve(omni_prompt, params)
        ignored, headers = self.ignored_fields(body, request, job.requests[0].request.has_guidance)
        answer = answer_in(AnswerStyle.of(body, image_format, ignored))
        outputs = self.omni.submit(job)
        if self.settings.log_requests:
            log_arrival([scheduled.request for scheduled in job.requests])
        if self.settings.log_prompts:
            logger.info("prompt %r, %s", omni_prompt, params)
        if body.stream:
            events = answer.events(outputs)
            return ImageEventStream(outputs, events, self.settings.keep_alive_seconds, headers, holding.moved())
        async with aclosing(outputs):
            response = await unless_disconnected(request, _finish(outputs, answer))
        response.headers.update(headers)
        return response

    def file(self, file_id: str) -> Response:
        """A stored picture; 404 once it has expired."""
        if (found := self.files.get(file_id)) is None:
            raise HTTPException(404, "There is no such file, or its time has passed.")
        headers = {"cache-control": "private, immutable", "x-content-type-options": "nosniff"}
        return Response(found.data, media_type=found.content_type, headers=headers)


async def _finish(outputs: OutputStream, answer: Answer) -> Response:
    async for output in outputs:
        if output.finished:
            return await answer.response(output)
    raise AssertionError("a stream of outputs ends with its result or an error")


def _edit_bodies(model_name: str) -> dict[str, Any]:
    """OpenAPI's `content` of `/edits`, a route that reads its bodies itself. Swagger UI shows the first one."""
    in_json, form_example = body_schema(ImageEditRequest), edit_form_example(model_name)
    # Swagger UI fills a form from the examples of its fields, and without one from the type: "string" as the model.
    in_form = {
        name: {**schema, "example": form_example.get(name, "")}
        for name, schema in in_json["properties"].items()
        if name not in ("image", "images", "mask", "markup")
    }
    file = {"type": "string", "format": "binary"}
    in_form["image"] = {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}
    return {
        "application/json": {
            "schema": {**in_json, "required": ["prompt"], "oneOf": [{"required": ["images"]}, {"required": ["image"]}]},
            "example": edit_example(model_name),
        },
        "multipart/form-data": {
            "schema": {**in_json, "properties": in_form, "required": ["image", "prompt"]},
            "example": form_example,
        },
    }


def make_images_router(service: ImageService) -> APIRouter:
    """The routes. The schema has those that the served model can answer; the others say where to go instead."""
    router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERROR_RESPONSES)
    model_name, info = service.settings.served_model_names[0], service.omni.info
    makes_from_text = not info.makes_videos and (info.image_input is None or not info.image_input.min_images)
    edits_pictures = not info.makes_videos and info.image_input is not None

    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    event_stream = {"content": {"text/event-stream": {"schema": {**event, "required": ["data"]}}}}  # of each event

    @router.post(
        "/generations",
        summary="Make pictures from a prompt",
        response_model=ImagesResponse,
        responses={200: event_stream},
        openapi_extra={"requestBody": json_request_body(ImageGenerationRequest, generation_example(model_name))},
        include_in_schema=makes_from_text,
    )
    async def generations(request: Request) -> Response:
        """Make pictures from a prompt; server-sent events with `stream`."""
        return await service.create(request)

    image_file_content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in CONTENT_TYPES.values()}

    @router.head("/files/{file_id}", include_in_schema=False)
    @router.get(
        "/files/{file_id}",
        name=FILE_ROUTE,
        summary="Fetch a picture by its link",
        response_class=Response,
        responses={200: {"content": image_file_content}},
    )
    async def image_file(file_id: str) -> Response:
        """Fetch a picture that was asked for with `response_format=url`."""
        return service.file(file_id)

    @router.post(
        "/edits",
        summary="Make pictures from pictures and a prompt",
        response_model=ImagesResponse,
        responses={200: event_stream},
        openapi_extra={"requestBody": {"required": True, "content": _edit_bodies(model_name)}},
        include_in_schema=edits_pictures,
    )
    async def edits(request: Request) -> Response:
        """Make pictures from pictures and a prompt; server-sent events with `stream`."""
        return await service.edit(request)

    @router.post("/variations", include_in_schema=False)
    async def variations() -> Response:
        """Refused: no model makes variations."""
        raise HTTPException(404, "Variations are not available: use POST /v1/images/generations with another seed.")

    return router
