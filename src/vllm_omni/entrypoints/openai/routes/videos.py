"""The routes under `/v1/videos`, for a model that makes videos."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.routes.video_service import VideoService
from vllm_omni.entrypoints.openai.schema.examples import video_example, video_form_example
from vllm_omni.entrypoints.openai.schema.images import MAX_INPUT_IMAGES, body_schema, json_request_body
from vllm_omni.entrypoints.openai.schema.videos import (
    REFERENCE_FIELDS,
    ContentQuery,
    CreatedVideo,
    DeletedVideo,
    RemixRequest,
    Video,
    VideoList,
    VideoListQuery,
    VideoRequest,
    query_parameters,
)

CONTENT_ROUTE = "video_content"
"""Name of the route that answers with the file of a video."""

_FILE = {"type": "string", "format": "binary"}
_VIDEO_TYPES = ("video/mp4", "video/webm", "image/gif")
_STILL_TYPES = ("image/webp", "image/jpeg")


def make_videos_router(service: VideoService) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=ERROR_RESPONSES)
    info, model_name = service.pictures.omni.info, service.pictures.settings.served_model_names[0]
    needs_image = info.image_input is not None and info.image_input.min_images > 0
    body = {"requestBody": {"required": True, "content": _bodies(model_name, needs_image)}}

    @router.post("", summary="Begin a video", response_model=CreatedVideo, openapi_extra=body)
    async def create(request: Request) -> Response:
        """Make a job, which makes a video from a prompt, and from pictures if the model takes some."""
        return await service.create(request)

    @router.get(
        "",
        summary="List the videos",
        response_model=VideoList,
        openapi_extra={"parameters": query_parameters(VideoListQuery)},
    )
    async def list_videos(request: Request) -> Response:
        """Jobs of the API key, one page at a time."""
        return await service.list(request)

    @router.post(
        "/sync",
        summary="Make a video and wait for it",
        response_class=Response,
        responses={200: {"content": _files(_VIDEO_TYPES)}},
        openapi_extra=body,
    )
    async def sync(request: Request) -> Response:
        """Make a video, whose file is the answer. There is no job: the video ends when the client disconnects."""
        return await service.make_now(request)

    _add_unavailable(router)
    _add_routes_of_one_video(router, service)
    return router


def _add_routes_of_one_video(router: APIRouter, service: VideoService) -> None:
    @router.get("/{video_id}", summary="Show a video's job", response_model=Video)
    async def retrieve(video_id: str, request: Request) -> Response:
        """Status and progress of a job."""
        return await service.retrieve(video_id, request)

    @router.delete("/{video_id}", summary="Delete a video", response_model=DeletedVideo)
    async def delete(video_id: str, request: Request) -> Response:
        """Remove a job and its files; a job that runs is stopped."""
        return await service.delete(video_id, request)

    @router.post(
        "/{video_id}/remix",
        summary="Make a video again with another prompt",
        response_model=CreatedVideo,
        openapi_extra={"requestBody": json_request_body(RemixRequest, {"prompt": "a green apple"})},
    )
    async def remix(video_id: str, request: Request) -> Response:
        """Make a job with another prompt, and the other parameters of a completed one, its seed included."""
        return await service.remix(video_id, request)

    @router.head("/{video_id}/content", include_in_schema=False)
    @router.get(
        "/{video_id}/content",
        name=CONTENT_ROUTE,
        summary="Fetch a video's file",
        response_class=Response,
        responses={200: {"content": _files(_VIDEO_TYPES + _STILL_TYPES)}, 206: {"content": _files(_VIDEO_TYPES)}},
        openapi_extra={"parameters": query_parameters(ContentQuery)},
    )
    async def content(video_id: str, request: Request) -> Response:
        """The file of a completed job, its thumbnail or its spritesheet; also a range of bytes of it."""
        return await service.content(video_id, request)

    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}

    @router.get(
        "/{video_id}/events",
        summary="Listen to a video's progress",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {**event, "required": ["data"]}}}}},
    )
    async def events(video_id: str, request: Request) -> Response:
        """Server-sent events: `video.progress`, `video.preview`, and last `video.completed` or `video.failed`."""
        return await service.events(video_id, request)


def _add_unavailable(router: APIRouter) -> None:
    """Routes of OpenAI that no model here can answer. They come before `{video_id}`, which would take their names."""

    @router.api_route("/edits", methods=["GET", "POST"], include_in_schema=False)
    @router.api_route("/extensions", methods=["GET", "POST"], include_in_schema=False)
    @router.api_route("/characters", methods=["GET", "POST"], include_in_schema=False)
    @router.api_route("/characters/{rest:path}", methods=["GET"], include_in_schema=False)
    async def unavailable(request: Request) -> Response:
        raise HTTPException(501, "Videos are neither edited nor extended here, and have no characters.")


def _bodies(model_name: str, needs_image: bool) -> dict[str, Any]:
    """OpenAPI's `content` of a request for a video. Swagger UI shows the first entry."""
    in_json, in_form = body_schema(VideoRequest), video_form_example(model_name)
    # Swagger UI fills a form field without an example from its type: it would send "string" as the model.
    fields = {
        name: {**schema, "example": in_form.get(name, "")}
        for name, schema in in_json["properties"].items()
        if name not in REFERENCE_FIELDS
    }
    fields["input_reference"] = {"type": "array", "items": _FILE, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}
    required = ["prompt", *(["input_reference"] if needs_image else [])]
    example = video_example(model_name, needs_image)
    return {
        "application/json": {"schema": in_json, "example": example},
        "multipart/form-data": {
            "schema": {**in_json, "properties": fields, "required": required},
            "example": in_form,
        },
    }


def _files(types: tuple[str, ...]) -> dict[str, Any]:
    return {kind: {"schema": _FILE} for kind in types}
