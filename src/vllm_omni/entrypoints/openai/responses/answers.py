"""Parts that all answers share: options, usage, timings, JSON around encoded pictures, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import error_body
from vllm_omni.entrypoints.openai.responses.encoding import ImageFormat
from vllm_omni.entrypoints.openai.schema.images import (
    ErrorResponse,
    ImageEditRequest,
    ImageOptions,
    ReportedQuality,
    TokenDetails,
    Usage,
)
from vllm_omni.errors import RequestError
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

logger = logging.getLogger(__name__)

# sse-starlette ends every stream when uvicorn gets SIGTERM. Here the server finishes running requests first.
AppStatus.disable_automatic_graceful_drain()

# Models here have one quality. OpenAI's response type has no `auto`, `standard` and `hd`, so their meaning is reported.
_REPORTED_QUALITY: dict[str, ReportedQuality] = {"auto": "high", "hd": "high", "standard": "medium"}


class Answer(Protocol):
    """Form in which one route answers a request."""

    def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """Server-sent events of a stream, framed."""

    async def response(self, outputs: OutputStream) -> Response:
        """Response in one piece, when the last output has come."""


@dataclass(frozen=True)
class ResponseOptions:
    """Options of a request that shape its answer and not its pixels."""

    image_format: ImageFormat
    quality: str
    safety_identifier: str | None
    event: str
    """First part of the names of a stream's events."""
    ignored_fields: tuple[str, ...]
    """Names of the request's fields that had no effect."""

    @classmethod
    def of(cls, body: ImageOptions, image_format: ImageFormat, ignored_fields: tuple[str, ...]) -> ResponseOptions:
        return cls(
            image_format,
            _REPORTED_QUALITY.get(body.quality, body.quality),
            body.safety_identifier,
            "image_edit" if isinstance(body, ImageEditRequest) else "image_generation",
            ignored_fields,
        )

    def picture_fields(self, pixels: np.ndarray) -> dict[str, Any]:
        """Fields of responses and events that describe a picture [height, width, 3]."""
        return {
            "background": "opaque",
            "output_format": self.image_format.name,
            "quality": self.quality,
            "size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        }

    def identifier_fields(self) -> dict[str, Any]:
        return identifier_fields(self.safety_identifier)


def identifier_fields(safety_identifier: str | None) -> dict[str, Any]:
    """`safety_identifier` if the request has one."""
    return {"safety_identifier": safety_identifier} if safety_identifier else {}


async def last_output(outputs: OutputStream) -> OmniRequestOutput:
    """The result of a request, which is the last of its outputs."""
    async for output in outputs:
        if output.finished:
            return output
    raise AssertionError("a stream of outputs ends with its result or an error")


def is_finished_picture(output: OmniRequestOutput) -> bool:
    """Whether an output of a stream brings a finished picture and not a preview."""
    return bool(output.images) and output.step == output.num_inference_steps


def usage(output: OmniRequestOutput, *, has_input: bool = True) -> Usage:
    """Tokens of the prompt and of its input pictures, counted once, and latent patches of the finished pictures.

    has_input: False if an earlier event of the stream has counted the input.
    """
    num_text, num_images = (output.num_prompt_tokens, output.num_input_image_tokens) if has_input else (0, 0)
    return Usage(
        input_tokens=num_text + num_images,
        output_tokens=output.num_output_tokens,
        total_tokens=num_text + num_images + output.num_output_tokens,
        input_tokens_details=TokenDetails(text_tokens=num_text, image_tokens=num_images),
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=output.num_output_tokens),
    )


async def encode_all(
    pictures: Iterable[Awaitable[bytes]], timings: Mapping[str, float]
) -> tuple[list[bytes], dict[str, float]]:
    """The encoded `pictures`, and `timings` with the seconds of the encoding: as `media_encode`, and in `total`."""
    start = time.monotonic()
    encoded = await asyncio.gather(*pictures)
    seconds = time.monotonic() - start
    return encoded, {**timings, "media_encode": seconds, "total": timings.get("total", 0.0) + seconds}


def json_with_list(fields: Mapping[str, Any], name: str, items: Iterable[bytes]) -> StreamingResponse:
    """A JSON response: `fields`, and `items`, which are JSON already, in the list `name`.

    It is sent in pieces: pictures can be many megabytes, and nothing copies or scans them on the event loop.
    """
    first, *others = items
    head = json.dumps(fields, separators=(",", ":")).encode()
    pieces = [head[:-1], b',"%s":[' % name.encode(), first, *(b"," + item for item in others), b"]}"]
    headers = {"content-length": str(sum(map(len, pieces)))}
    return StreamingResponse(_each(pieces), media_type="application/json", headers=headers)


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


class EventStream(EventSourceResponse):  # type: ignore[misc]  # mypy is told to skip sse_starlette
    """Sends `events` as they come; a failure becomes the last event.

    However the response ends, even before its first event, it closes `outputs`, the source of `events`, and leaves
    `reservation`. Closing the outputs of a request aborts it.
    """

    def __init__(
        self,
        outputs: OutputStream | AsyncGenerator[Any, None],
        events: AsyncGenerator[bytes, None],
        keep_alive_seconds: float,
        headers: Mapping[str, str],
        reservation: AbstractContextManager[object],
    ) -> None:
        super().__init__(_with_failure(events), ping=keep_alive_seconds, headers=headers)
        self._outputs = outputs
        self._reservation = reservation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reservation:
            async with aclosing(self._outputs):
                await super().__call__(scope, receive, send)


async def _with_failure(events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """`events`, and an event with the error object if they fail."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except Exception as error:  # the status line is sent already, so any failure must become the last event
        if not isinstance(error, RequestError):
            logger.exception("An event stream failed")
        yield frame(ErrorResponse(error=error_body(error)).model_dump_json().encode())


def frame(data: bytes) -> bytes:
    """One event as bytes, which sse-starlette sends unchanged; it would search a string for line ends."""
    return data.join(frame_around())


def frame_around(kind: str | None = None) -> tuple[bytes, bytes]:
    """Bytes before and after the data of an event. `kind`: name of the event, if it has one."""
    name = b"" if kind is None else b"event: %s\r\n" % kind.encode()
    return name + b"data: ", b"\r\n\r\n"
