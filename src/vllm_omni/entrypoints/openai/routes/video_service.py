"""The path of requests for videos from their bodies to the jobs' service, and back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
from fastapi import Request
from starlette.responses import JSONResponse, Response

from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.entrypoints.openai.requests.body_reader import (
    BodyReader,
    UploadReservation,
    unless_disconnected,
    validated,
)
from vllm_omni.entrypoints.openai.requests.parameters import sampling_params, unknown_fields
from vllm_omni.entrypoints.openai.requests.picture_body import PictureBodyReader
from vllm_omni.entrypoints.openai.requests.video_body import VIDEO_BODY
from vllm_omni.entrypoints.openai.responses.answers import EventStream
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder, ImageFormat
from vllm_omni.entrypoints.openai.responses.ranges import RangedFile, respond
from vllm_omni.entrypoints.openai.responses.videos import EventEncoder, is_live, video_fields, video_list
from vllm_omni.entrypoints.openai.routes.picture_service import PictureService, log_request
from vllm_omni.entrypoints.openai.schema.videos import (
    ContentQuery,
    CreatedVideo,
    DeletedVideo,
    RemixRequest,
    VideoListQuery,
    VideoOptions,
    VideoRequest,
)
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.errors import InvalidRequestError, RequestError, UnsupportedParameterError
from vllm_omni.inputs.data import OmniPrompt
from vllm_omni.inputs.images import InputImage
from vllm_omni.jobs import Job
from vllm_omni.video_jobs.job_requests import NewVideo
from vllm_omni.video_jobs.service import VideoJobs
from vllm_omni.video_jobs.views import VideoView

logger = logging.getLogger(__name__)

POLL_HEADER = "openai-poll-after-ms"
"""Milliseconds after which the SDK's poll helper asks again."""
SEED_HEADER = "x-omni-seed"
"""Seed of a video that is answered as a file."""
MAX_KEY_CHARACTERS = 255
_PNG = ImageFormat("png", 100)


@dataclass(frozen=True)
class AskedVideo:
    """A checked request for a video."""

    new: NewVideo
    job: Job
    """The engine's request for it."""
    ignored: tuple[str, ...]
    """Names of the fields without effect."""
    headers: dict[str, str]
    """Header with these names, if there are some."""

    def log(self, settings: ServerSettings, request_id: str) -> None:
        """Log the request, and its prompt, as far as flags ask for it."""
        if settings.log_requests:
            log_request([replace(self.job.requests[0].request, request_id=request_id)])
        if settings.log_prompts:
            logger.info("prompt %r, %s", self.new.checked.prompt, self.new.checked.given)


@dataclass(frozen=True)
class VideoService:
    """Answers the requests of `/v1/videos`, for a model that makes videos."""

    pictures: PictureService
    bodies: BodyReader
    uploads: PictureBodyReader
    jobs: VideoJobs
    event_encoder: EventEncoder

    async def create(self, request: Request) -> Response:
        """Make a job, and answer with it. Everything that can be wrong with the request is refused here.

        Raises RequestError or RequestValidationError; HTTPException (408, 413) for slow and for large bodies.
        """
        pictures, key = self.pictures, idempotency_key(request)
        with pictures.budget.reserve() as reservation, _own_field_names():
            asked = await self._read(request, reservation)
            files = await png_files(pictures.encoder, reservation.images)
            new = replace(asked.new, input_files=files, idempotency_key=key)
            job = await self.jobs.create(new)
        asked.log(pictures.settings, job.id)
        return await self._created(job.id, request, asked.ignored, asked.headers)

    async def make_now(self, request: Request) -> Response:
        """Make a video without a job, and answer with its file; stop when the client leaves. Raises as `create`."""
        with self.pictures.budget.reserve() as reservation, _own_field_names():
            asked = await self._read(request, reservation)
            reservation.replace_images(asked.new.checked.prompt.images)
            asked.log(self.pictures.settings, asked.job.request_id)
            return await unless_disconnected(request, self._file(asked))

    async def _file(self, asked: AskedVideo) -> Response:
        async with self.jobs.make_now(asked.new, job=asked.job) as encoded:
            data = await asyncio.to_thread(encoded.video.read_bytes)
            seed = str(asked.job.requests[0].request.seed)
            headers = {**asked.headers, SEED_HEADER: seed, **_file_headers(encoded.video.name)}
            return Response(data, media_type=encoded.content_type, headers=headers)

    async def _read(self, request: Request, reservation: UploadReservation) -> AskedVideo:
        """A request that was read and checked; its uploaded pictures are in `reservation`."""
        pictures = self.pictures
        body = await self.uploads.read(VIDEO_BODY, request, reservation)
        pictures.names.check(body.model)
        if (images := pictures.omni.info.image_input) is not None and images.min_images > len(reservation.images):
            raise InvalidRequestError(
                "input_reference is required: the served model makes videos that begin with a picture, a file of that "
                'name in a form, or {"image_url": "data:image/png;base64,..."} in JSON',
                param="input_reference",
            )
        params = sampling_params(body, pictures.names, body.partial_images)
        prompt = OmniPrompt(body.prompt, body.negative_prompt, reservation.images)
        checked = await pictures.checker.check(prompt, params, pictures.decoder)
        check_is_video(checked, body)
        job = await pictures.checker.make_job(checked)  # counts the tokens of the prompt, and draws the seed
        first = job.requests[0].request
        checked = replace(checked, params=replace(checked.params, seed=first.seed))
        ignored, headers = pictures.ignored_fields(body, request, first.has_guidance)
        new = NewVideo(
            owner=owner_of(request, pictures.settings),
            model=body.model or pictures.settings.served_model_names[0],
            prompt=checked.prompt,
            checked=checked,
            output_format=body.output_format,
        )
        return AskedVideo(new, job, ignored, headers)

    async def retrieve(self, video_id: str, request: Request) -> Response:
        """One job. Raises JobNotFoundError, as all methods with an id do."""
        view = await self._view(video_id, request)
        return JSONResponse(video_fields(view), headers=_poll_headers(view))

    async def list(self, request: Request) -> Response:
        """One page of the client's jobs. Raises RequestValidationError, and InvalidRequestError for `after`."""
        query = validated(lambda: VideoListQuery.model_validate_strings(dict(request.query_params), strict=False))
        newest_first = query.order == "desc"
        page = await self.jobs.list(owner_of(request, self.pictures.settings), query.after, query.limit, newest_first)
        return JSONResponse(video_list(*page))

    async def delete(self, video_id: str, request: Request) -> Response:
        """Remove a job and its files; one that runs is stopped."""
        await self.jobs.delete(video_id, owner_of(request, self.pictures.settings))
        return JSONResponse(DeletedVideo(id=video_id).model_dump())

    async def remix(self, video_id: str, request: Request) -> Response:
        """Make a job with another prompt and the other parameters of a completed one. Raises as `create`."""
        key = idempotency_key(request)
        with self.pictures.budget.reserve() as reservation, _own_field_names():
            body = await self.bodies.model(request, reservation, RemixRequest, self.pictures.settings.max_body_bytes)
            owner = owner_of(request, self.pictures.settings)
            job = await self.jobs.remix(video_id, owner, body.prompt, reservation.add, key)
        ignored, headers = self.pictures.note_ignored(unknown_fields(body), request)
        return await self._created(job.id, request, ignored, headers)

    async def content(self, video_id: str, request: Request) -> Response:
        """A file of a completed job, or a range of it. Raises HTTPException (416) for a range behind its end."""
        query = validated(lambda: ContentQuery.model_validate_strings(dict(request.query_params), strict=False))
        found = await self.jobs.content(video_id, owner_of(request, self.pictures.settings), query.variant)
        file = RangedFile(found.size, found.etag, found.content_type, found.read)
        return respond(file, request, _file_headers(found.file_name))

    async def events(self, video_id: str, request: Request) -> Response:
        """Events of a job until it has ended."""
        await self._view(video_id, request)  # an unknown id is a 404 and not an event
        events = self.jobs.events(video_id, owner_of(request, self.pictures.settings))
        sent = self.event_encoder.sent(events)
        return EventStream(events, sent, self.pictures.settings.keep_alive_seconds, {}, nullcontext())

    async def _created(
        self, video_id: str, request: Request, ignored: tuple[str, ...], headers: dict[str, str]
    ) -> Response:
        view = await self._view(video_id, request)
        answer = CreatedVideo(**video_fields(view), ignored_fields=[*ignored])
        return JSONResponse(answer.model_dump(), headers={**headers, **_poll_headers(view)})

    async def _view(self, video_id: str, request: Request) -> VideoView:
        return await self.jobs.get(video_id, owner_of(request, self.pictures.settings))


def owner_of(request: Request, settings: ServerSettings) -> str:
    """SHA-256, in hex, of the API key of a request; empty if the server has no keys. The key was checked before."""
    if not settings.requires_api_key:
        return ""
    key = request.headers.get("authorization", "").partition(" ")[2]
    return hashlib.sha256(key.encode()).hexdigest()


def idempotency_key(request: Request) -> str | None:
    """Header `Idempotency-Key`: repeated requests with one key make one job. Raises InvalidRequestError."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        raise InvalidRequestError(
            f"Idempotency-Key takes 1 to {MAX_KEY_CHARACTERS} characters, got {len(key)}", param="Idempotency-Key"
        )
    return key


def check_is_video(checked: CheckedPrompt, body: VideoOptions) -> None:
    """Raise InvalidRequestError for a video of one frame."""
    if checked.params.num_frames == 1:
        asked = "num_frames" if body.seconds is None else "seconds"
        raise InvalidRequestError(
            f"{asked}: the video would have one frame; POST /v1/images/generations makes pictures", param=asked
        )


async def png_files(encoder: ImageEncoder, images: Sequence[InputImage]) -> tuple[bytes, ...]:
    """Input pictures as files, from which a job is run."""
    return tuple([await encoder.file(_larger(image), _PNG) for image in images])


def _larger(image: InputImage) -> np.ndarray:
    """Pixels that are nearest to the upload: a job is prepared again from them, for whatever server runs it."""
    return image.condition if image.condition.size > image.reference.size else image.reference


def _poll_headers(view: VideoView) -> dict[str, str]:
    return {POLL_HEADER: str(view.poll_after_ms)} if is_live(view) else {}


def _file_headers(file_name: str) -> dict[str, str]:
    return {
        "content-disposition": f'inline; filename="{file_name}"',
        "cache-control": "private",
        "x-content-type-options": "nosniff",
    }


@contextmanager
def _own_field_names() -> Iterator[None]:
    """Name the fields of a request for a video in the errors of the block."""
    try:
        yield
    except UnsupportedParameterError as error:
        raise InvalidRequestError(error.message_among(VideoRequest.model_fields), param=error.param) from error
    except RequestError as error:
        if error.param not in ("image", "image_url"):
            raise
        renamed = error.copy()
        renamed.param = "input_reference"
        renamed.args = (re.sub(r"^image(_url)?\b", renamed.param, str(error)),)
        raise renamed from error
