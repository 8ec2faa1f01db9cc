"""Server-sent events: their framing, and the response that sends them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractContextManager, aclosing

from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import error_body
from vllm_omni.entrypoints.openai.schema.images import ErrorResponse
from vllm_omni.errors import RequestError
from vllm_omni.jobs import OutputStream

logger = logging.getLogger(__name__)

# sse-starlette ends every stream when uvicorn gets SIGTERM. Here the server finishes running requests first.
AppStatus.disable_automatic_graceful_drain()


class EventStream(EventSourceResponse):  # type: ignore[misc]  # mypy is told to skip sse_starlette
    """Sends `events` as they come; a failure becomes the last event.

    However the response ends, even before its first event, it closes `outputs`, which aborts the request, and leaves
    `reservation`.
    """

    def __init__(
        self,
        outputs: OutputStream,
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


def frame(data: bytes, kind: str | None = None) -> bytes:
    """One event as bytes, which sse-starlette sends unchanged; it would search a string for line ends."""
    start, end = frame_around(kind)
    return b"".join((start, data, end))


def frame_around(kind: str | None = None) -> tuple[bytes, bytes]:
    """Bytes before and after the data of an event. `kind`: name of the event, if it has one."""
    name = b"" if kind is None else b"event: %s\r\n" % kind.encode()
    return name + b"data: ", b"\r\n\r\n"
