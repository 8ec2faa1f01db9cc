"""`stream: true`: partial and finished pictures as server-sent events."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractContextManager, aclosing
from typing import Any

import numpy as np
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import error_body
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder, json_around_image
from vllm_omni.entrypoints.openai.responses.images import AnswerStyle, usage
from vllm_omni.entrypoints.openai.schema.images import ErrorResponse, Usage
from vllm_omni.errors import RequestError
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

logger = logging.getLogger(__name__)

# sse-starlette cuts every stream when uvicorn gets SIGTERM. Here whoever runs the server drains it first.
AppStatus.disable_automatic_graceful_drain()


class ImageEventStream(EventSourceResponse):  # type: ignore[misc]  # mypy is told to skip sse_starlette
    """Sends events and, however it ends (also before the first event), closes `outputs`: that aborts the request.
    `held` is left then.

    A failure is the last event.
    """

    def __init__(
        self,
        outputs: OutputStream,
        events: AsyncGenerator[bytes, None],
        keep_alive_seconds: float,
        headers: Mapping[str, str],
        held: AbstractContextManager[object],
    ) -> None:
        super().__init__(_failing_in_words(events), ping=keep_alive_seconds, headers=headers)
        self._outputs = outputs
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            async with aclosing(self._outputs):
                await super().__call__(scope, receive, send)


async def image_events(outputs: OutputStream, style: AnswerStyle, encoder: ImageEncoder) -> AsyncGenerator[bytes, None]:
    """`image_generation.partial_image` events, and `image_generation.completed` for each picture once it is done; of
    edits `image_edit.*`.

    With several pictures, `index` (ours) says which one an event speaks of, and the usage of the first one that is done
    counts the input: the usages of a stream add up to that of an answer in one piece.
    """
    num_partial: Counter[int] = Counter()
    num_done = 0
    async for output in outputs:
        if output.finished:
            return  # every picture has had its event
        if is_done(output):
            yield await _completed(output, usage(output, has_input=num_done == 0), style, encoder)
            num_done += 1
        elif output.images:
            fields = {"partial_image_index": num_partial[output.index], "index": output.index}
            num_partial[output.index] += 1
            yield await _event(f"{style.event}.partial_image", output.images[0], fields, style, encoder)


def is_done(output: OmniRequestOutput) -> bool:
    """Whether it brings a picture of a stream, and not a preview."""
    return bool(output.images) and output.step == output.num_inference_steps


async def _failing_in_words(events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """`events`; a failure is the last one."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except Exception as error:  # the status line is gone: any failure must become the last event
        if not isinstance(error, RequestError):
            logger.exception("a stream failed")
        yield frame(ErrorResponse(error=error_body(error)).model_dump_json().encode())


async def _completed(output: OmniRequestOutput, used: Usage, style: AnswerStyle, encoder: ImageEncoder) -> bytes:
    fields: dict[str, Any] = {"usage": used.model_dump(), "timings": output.timings}
    if style.safety_identifier:
        fields["safety_identifier"] = style.safety_identifier
    fields |= {"ignored_fields": style.ignored_fields, "seed": output.seeds[0], "index": output.index}
    return await _event(f"{style.event}.completed", output.images[0], fields, style, encoder)


async def _event(
    kind: str, pixels: np.ndarray, fields: Mapping[str, Any], style: AnswerStyle, encoder: ImageEncoder
) -> bytes:
    shared = {"type": kind, "created_at": int(time.time()), **style.fields(pixels)}
    (start, end), (before, after) = frame_around(kind), json_around_image({**shared, **fields})
    return await encoder.base64(pixels, style.image_format, start + before, after + end)


def frame(data: bytes, kind: str | None = None) -> bytes:
    """One event as bytes: sse-starlette passes those through, where it would scan a string for line ends."""
    start, end = frame_around(kind)
    return b"".join((start, data, end))


def frame_around(kind: str | None = None) -> tuple[bytes, bytes]:
    """Bytes before and after an event's data."""
    name = b"" if kind is None else b"event: %s\r\n" % kind.encode()
    return name + b"data: ", b"\r\n\r\n"
