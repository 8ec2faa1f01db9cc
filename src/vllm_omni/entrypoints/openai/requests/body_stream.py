"""The bytes of a request's body as they arrive, bounded in time and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from vllm_omni.entrypoints.openai.requests.upload_budget import UploadReservation
from vllm_omni.entrypoints.openai.requests.upload_rate import UploadRate
from vllm_omni.errors import RequestAbortedError


def content_type(request: Request) -> str:
    """The media type of the body in lower case, without parameters; empty if the request has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def body_chunks(request: Request, reservation: UploadReservation, silence_seconds: float) -> AsyncIterator[bytes]:
    """Chunks of the body; the bytes of each are added to `reservation`. `silence_seconds`: see `UploadRate`.

    Raises HTTPException (408) for a sender that is too slow, RequestAbortedError for one that disconnects, and
    QueueFullError when the upload budget is used up.
    """
    stream, clock = aiter(request.stream()), asyncio.get_running_loop().time
    rate = UploadRate(silence_seconds)
    try:
        while True:
            asked = clock()
            async with asyncio.timeout(rate.seconds_left):
                chunk = await anext(stream)
            rate.count(len(chunk), clock() - asked)
            reservation.add(len(chunk))
            yield chunk
    except StopAsyncIteration:
        return
    except TimeoutError as error:
        # The rest of the body would be parsed as the beginning of another request.
        headers = {"connection": "close"}
        raise HTTPException(408, f"The request's body came with less than {rate}.", headers) from error
    except ClientDisconnect as error:
        raise RequestAbortedError("the client closed the connection") from error
