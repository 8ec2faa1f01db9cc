"""The routes under `/v1/images`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.requests.body_reader import BodyReader, UploadReservation
from vllm_omni.entrypoints.openai.requests.edit_body import EDIT_BODY
from vllm_omni.entrypoints.openai.requests.picture_body import PictureBodyReader
from vllm_omni.entrypoints.openai.responses.encoding import CONTENT_TYPES
from vllm_omni.entrypoints.openai.responses.images import ImagesAnswer
from vllm_omni.entrypoints.openai.responses.stored_files import FILE_ROUTE, FileStore
from vllm_omni.entrypoints.openai.routes.picture_service import PictureService
from vllm_omni.entrypoints.openai.schema.examples import EDIT_PROMPT, edit_example, form_example
from vllm_omni.entrypoints.openai.schema.images import (
    MAX_INPUT_IMAGES,
    ImageEditRequest,
    ImageGenerationRequest,
    ImageOptions,
    ImagesResponse,
    body_schema,
    json_request_body,
)
from vllm_omni.errors import InvalidRequestError

EDITS_PATH = "/v1/images/edits"
GENERATIONS_PATH = "/v1/images/generations"
VIDEOS_PATH = "/v1/videos"


@dataclass(frozen=True)
class ImageService:
    """Answers the requests of `/v1/images`."""

    pictures: PictureService
    bodies: BodyReader
    uploads: PictureBodyReader
    files: FileStore

    async def create(self, request: Request) -> Response:
        """Make pictures from a prompt.

        Raises RequestError or RequestValidationError; HTTPException (408, 413) for slow and for large bodies.
        """
        info = self.pictures.omni.info
        if info.needs_image:
            does, route = ("edits pictures", EDITS_PATH)
            if info.makes_videos:
                does, route = ("makes videos from pictures", VIDEOS_PATH)
            raise InvalidRequestError(f"The served model {does}: use POST {route}.", param="image")
        max_bytes = self.pictures.settings.max_body_bytes
        with self.pictures.budget.reserve() as reservation:
            body = await self.bodies.model(request, reservation, ImageGenerationRequest, max_bytes)
            return await self._answer(body, request, reservation)

    async def edit(self, request: Request) -> Response:
        """Make pictures from pictures and a prompt. Raises as `create`."""
        info = self.pictures.omni.info
        if not info.edits_pictures:  # before megabytes are read
            raise InvalidRequestError(_why_no_edits(info), param="model")
        with self.pictures.budget.reserve() as reservation:
            body = await self.uploads.read(EDIT_BODY, request, reservation)
            if not reservation.images:
                elsewhere = "" if info.needs_image else f"; without one use POST {GENERATIONS_PATH}"
                raise InvalidRequestError(
                    "image is required: files of that name in a form, or "
                    f'"images": [{{"image_url": "data:image/png;base64,..."}}] in JSON{elsewhere}',
                    param="image",
                )
            return await self._answer(body, request, reservation)

    async def _answer(self, body: ImageGenerationRequest, request: Request, reservation: UploadReservation) -> Response:
        def store(data: bytes, content_type: str) -> str:
            return str(request.url_for(FILE_ROUTE, file_id=self.files.put(data, content_type)))

        _check_is_picture(body, self.pictures.omni.info)
        response_format = body.response_format or self.pictures.settings.default_response_format
        make_answer = partial(ImagesAnswer, self.pictures.encoder, store=store if response_format == "url" else None)
        return await self.pictures.answer(body, body.prompt, make_answer, request, reservation)

    def file(self, file_id: str) -> Response:
        """A stored picture. Raises HTTPException (404) if it is unknown or has expired."""
        if (found := self.files.get(file_id)) is None:
            raise HTTPException(404, "There is no such file, or its time has passed.")
        headers = {"cache-control": "private, immutable", "x-content-type-options": "nosniff"}
        return Response(found.data, media_type=found.content_type, headers=headers)


def _why_no_edits(info: ModelInfo) -> str:
    """Message for an edit that the model cannot make: the routes that make what it makes."""
    pictures = f"POST {GENERATIONS_PATH}"
    if not info.makes_videos:
        return f"The served model makes pictures from text and edits none: use {pictures}."
    videos = f"The served model makes videos and edits no pictures: POST {VIDEOS_PATH} makes videos"
    if info.needs_image:
        return f"{videos} from pictures."
    also = "" if info.image_input is None else ", also from pictures"
    return f"{videos}{also}, and {pictures} pictures from text."


def _check_is_picture(body: ImageOptions, info: ModelInfo) -> None:
    """Raise InvalidRequestError for the length of a video. Models that make no videos refuse it themselves."""
    for name, length in (("num_frames", 1), ("seconds", 0)):
        if info.makes_videos and (value := getattr(body, name)) not in (None, length):
            raise InvalidRequestError(
                f"{name} takes {length} for a picture, got {value}: POST {VIDEOS_PATH} makes videos", param=name
            )


def _edit_bodies(model_name: str) -> dict[str, Any]:
    """OpenAPI's `content` of `/edits`, a route that reads its bodies itself. Swagger UI shows the first entry."""
    in_json, example = body_schema(ImageEditRequest), form_example(model_name, EDIT_PROMPT)
    # Swagger UI fills a form field without an example from its type: it would send "string" as the model.
    in_form = {
        name: {**schema, "example": example.get(name, "")}
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
            "example": example,
        },
    }


def make_images_router(service: ImageService) -> APIRouter:
    """The routes. The schema shows those that the served model can answer; the others name the route to use instead."""
    router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERROR_RESPONSES)
    model_name, info = service.pictures.settings.served_model_names[0], service.pictures.omni.info

    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    event_stream = {
        "content": {"text/event-stream": {"schema": {**event, "required": ["data"]}}}
    }  # schema of each event

    @router.post(
        "/generations",
        summary="Make pictures from a prompt",
        response_model=ImagesResponse,
        responses={200: event_stream},
        openapi_extra={"requestBody": json_request_body(ImageGenerationRequest, form_example(model_name))},
        include_in_schema=not info.needs_image,
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
        """Fetch a picture that was made with `response_format=url`."""
        return service.file(file_id)

    @router.post(
        "/edits",
        summary="Make pictures from pictures and a prompt",
        response_model=ImagesResponse,
        responses={200: event_stream},
        openapi_extra={"requestBody": {"required": True, "content": _edit_bodies(model_name)}},
        include_in_schema=info.edits_pictures,
    )
    async def edits(request: Request) -> Response:
        """Make pictures from pictures and a prompt; server-sent events with `stream`."""
        return await service.edit(request)

    @router.post("/variations", include_in_schema=False)
    async def variations() -> Response:
        """Refused: no model makes variations."""
        raise HTTPException(404, "Variations are not available: use POST /v1/images/generations with another seed.")

    return router
