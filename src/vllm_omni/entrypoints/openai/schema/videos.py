"""Request and response bodies of OpenAI's video API, with our extensions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS
from vllm_omni.entrypoints.openai.schema.images import (
    ANY_CASE,
    MAX_INPUT_IMAGES,
    NUMBER_PATTERN,
    GenerationOptions,
    RequestBody,
    at_most,
    body_schema,
    number_in,
)

MAX_LISTED = 100
"""Most videos in one page of a list."""
REFERENCE_FIELDS = ("input_reference", "image_reference", "reference_url")
"""Names of the field with input pictures: OpenAI's, and those of two other servers."""

VideoFormat = Literal["mp4", "webm", "gif"]
Variant = Literal["video", "thumbnail", "spritesheet"]
VideoStatus = Literal["queued", "in_progress", "completed", "failed"]

_MAX_REFERENCE_ITEMS = 8
"""Most commas and brackets of a reference as JSON text: it is parsed on the event loop."""
_REFERENCE = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]},
    ]
}
_REFERENCES = {
    "anyOf": [*_REFERENCE["anyOf"], {"type": "array", "items": _REFERENCE, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}]
}


def reference_url(value: Any) -> str:
    """URL of one input picture: given as it is, as `{"image_url": ...}`, or as this object in JSON text.

    Raises PydanticCustomError, whose message takes the name of the field before it.
    """
    if _is_object(value) and sum(map(value.count, ",[{")) <= _MAX_REFERENCE_ITEMS:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # refused below as text that is no URL
        else:
            return reference_url(value)
    if isinstance(value, dict):
        given = {name: inner for name, inner in list(value.items())[:MAX_INPUT_IMAGES] if inner is not None}
        if "file_id" in given:
            raise PydanticCustomError("file_id", "takes image_url: this server keeps no files that file_id could name")
        value = given.get("image_url") if given.keys() == {"image_url"} else value
    if not isinstance(value, str) or not value or _is_object(value):
        raise PydanticCustomError("reference", 'takes a picture\'s URL or {"image_url": URL}')
    return value


def _is_object(value: Any) -> bool:
    """Whether `value` is the text of a JSON object."""
    return isinstance(value, str) and value[:_MAX_REFERENCE_ITEMS].lstrip()[:1] == "{"


def _reference_urls(value: Any) -> list[str]:
    return [reference_url(one) for one in (value if isinstance(value, list) else [value])]


References = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_reference_urls),
    at_most(MAX_INPUT_IMAGES),
    WithJsonSchema(_REFERENCES),
]


class VideoOptions(GenerationOptions):
    """Fields of every request for videos."""

    seconds: (
        Annotated[
            float,
            Field(gt=0),
            BeforeValidator(number_in),
            WithJsonSchema(
                {
                    "anyOf": [
                        {"type": "number", "exclusiveMinimum": 0},
                        {"type": "string", "pattern": f"^ *{NUMBER_PATTERN} *$"},
                    ]
                }
            ),
        ]
        | None
    ) = None
    """Length from the first frame to the last one, in place of `num_frames`: a number, or a string with one."""
    num_frames: Annotated[int, Field(ge=2)] | None = None
    """Length in frames. One frame is a picture: see `/v1/images/generations`."""
    fps: Annotated[int, Field(ge=1)] | None = None
    """Frames a second; if absent, the model's own."""
    output_format: Annotated[VideoFormat, ANY_CASE] = "mp4"
    """mp4: H.264; webm: VP9; gif."""


class VideoRequest(VideoOptions):
    """Body of `POST /v1/videos` and of `/v1/videos/sync`; in a form, the pictures are the files `input_reference`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    """Description of the video."""
    n: Annotated[int, Field(ge=1, le=1)] = 1
    """Number of videos: a job makes one."""
    num_outputs_per_prompt: Annotated[int, Field(ge=1, le=1)] | None = None
    """Another name of `n`."""
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    """Number of previews in `/v1/videos/{video_id}/events`; 0: as many as take little time."""
    input_reference: References | None = None
    """Picture with which the video begins, for models that take one; a second one is its last frame. In JSON: a URL,
    `{"image_url": URL}`, or a list of them; a URL is `data:image/png;base64,...` or one of an allowed host."""
    image_reference: References | None = None
    """Another name of `input_reference`."""
    reference_url: References | None = None
    """Another name of `input_reference`."""


class RemixRequest(RequestBody):
    """Body of `POST /v1/videos/{video_id}/remix`."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    """Description of the new video, whose other parameters are those of the old one."""


class VideoListQuery(RequestBody):
    """Query of `GET /v1/videos`."""

    after: str | None = None
    """Id of the last video of the page before, which may be deleted meanwhile."""
    limit: Annotated[int, Field(ge=1, le=MAX_LISTED)] = 20
    """Most videos of the page."""
    order: Annotated[Literal["asc", "desc"], ANY_CASE] = "desc"
    """desc: the newest first."""


class ContentQuery(RequestBody):
    """Query of `GET /v1/videos/{video_id}/content`."""

    variant: Annotated[Variant, ANY_CASE] = "video"
    """video: the file itself; thumbnail: one frame as WebP; spritesheet: frames in a grid as JPEG."""


class VideoFailure(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job that makes a video. Times are in Unix seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int
    """Percent of the work that is done, from 0 to 100."""
    created_at: int
    started_at: int | None
    completed_at: int | None
    """Time at which the job completed or failed."""
    expires_at: int | None
    """Time at which the video and its job are removed."""
    eta_seconds: float | None
    """Estimated seconds until the video is complete; null once the job has ended, or if nothing is known."""
    prompt: str
    seconds: str
    size: str
    num_frames: int
    fps: int | float
    seed: int
    num_inference_steps: int
    output_format: VideoFormat
    remixed_from_video_id: str | None
    error: VideoFailure | None
    """Reason of a failed job."""


class CreatedVideo(Video):
    """Answer to a request for a video."""

    ignored_fields: list[str]
    """Fields of the request that had no effect."""


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def query_parameters(model: type[RequestBody]) -> list[dict[str, Any]]:
    """OpenAPI's `parameters` of a route that reads its query itself."""
    return [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.get("description", "")}
        for name, schema in body_schema(model)["properties"].items()
    ]
