"""Finished pictures as OpenAI's response: fields around pixels."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from starlette.responses import Response, StreamingResponse

from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder, ImageFormat, json_around_image
from vllm_omni.entrypoints.openai.responses.stored_files import FileStore
from vllm_omni.entrypoints.openai.schema.images import (
    ImageData,
    ImageEditRequest,
    ImageOptions,
    ImagesResponse,
    ReportedQuality,
    TokenDetails,
    Usage,
)
from vllm_omni.jobs import OutputStream
from vllm_omni.outputs import OmniRequestOutput

# Models here have one quality. OpenAI's response type knows no `auto`, `standard` or `hd`: report their meaning.
_REPORTED_QUALITY: dict[str, ReportedQuality] = {"auto": "high", "hd": "high", "standard": "medium"}


@dataclass(frozen=True)
class AnswerStyle:
    """What of a request shapes its answer and not its pixels."""

    image_format: ImageFormat
    quality: str
    safety_identifier: str | None
    event: str
    """What the names of a stream's events begin with."""
    ignored_fields: tuple[str, ...]
    """Names of the request's fields that had no effect."""

    @classmethod
    def of(cls, body: ImageOptions, image_format: ImageFormat, ignored_fields: tuple[str, ...]) -> AnswerStyle:
        return cls(
            image_format,
            _REPORTED_QUALITY.get(body.quality, body.quality),
            body.safety_identifier,
            "image_edit" if isinstance(body, ImageEditRequest) else "image_generation",
            ignored_fields,
        )

    def fields(self, pixels: np.ndarray) -> dict[str, Any]:
        """What responses and events say of a picture [height, width, 3]."""
        return {
            "background": "opaque",
            "output_format": self.image_format.name,
            "quality": self.quality,
            "size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        }


class Answer(Protocol):
    """How one route answers."""

    def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream."""

    async def response(self, output: OmniRequestOutput) -> Response:
        """The answer in one piece, from the last output."""


def usage(output: OmniRequestOutput, *, has_input: bool = True) -> Usage:
    """Tokens of the prompt and of its input pictures, once, and of all that was made of them.

    has_input: False where an earlier event of the stream has counted the input.
    """
    num_text, num_images = (output.num_prompt_tokens, output.num_input_image_tokens) if has_input else (0, 0)
    return Usage(
        input_tokens=num_text + num_images,
        output_tokens=output.num_output_tokens,
        total_tokens=num_text + num_images + output.num_output_tokens,
        input_tokens_details=TokenDetails(text_tokens=num_text, image_tokens=num_images),
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=output.num_output_tokens),
    )


async def images_response(
    output: OmniRequestOutput, style: AnswerStyle, encode_item: Callable[[np.ndarray, int], Awaitable[bytes]]
) -> StreamingResponse:
    """The JSON answer; `encode_item(pixels, seed)` makes one entry of its `data`."""

    def envelope(timings: dict[str, float]) -> dict[str, Any]:
        return ImagesResponse(
            created=int(time.time()),
            usage=usage(output),
            timings=timings,
            safety_identifier=style.safety_identifier,
            ignored_fields=list(style.ignored_fields),
            data=[],
            **style.fields(output.images[0]),
        ).model_dump(exclude={"data"}, exclude_none=True)

    items = [encode_item(pixels, seed) for pixels, seed in zip(output.images, output.seeds, strict=True)]
    return await json_around(items, "data", output, envelope)


async def json_around(
    items: Iterable[Awaitable[bytes]],
    name: str,
    output: OmniRequestOutput,
    envelope: Callable[[dict[str, float]], Mapping[str, Any]],
) -> StreamingResponse:
    """`envelope(timings)` as JSON, and `items` in its list `name`.

    Sent in pieces: pictures can be many megabytes, and nothing copies or scans them on the event loop.
    """
    start = time.monotonic()
    first, *others = await asyncio.gather(*items)
    seconds = time.monotonic() - start
    timings = {**output.timings, "media_encode": seconds, "total": output.timings.get("total", 0.0) + seconds}
    head = json.dumps(envelope(timings), separators=(",", ":")).encode()
    pieces = [head[:-1], b',"%s":[' % name.encode(), first, *(b"," + item for item in others), b"]}"]
    headers = {"content-length": str(sum(map(len, pieces)))}
    return StreamingResponse(_each(pieces), media_type="application/json", headers=headers)


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def base64_items(encoder: ImageEncoder, style: AnswerStyle) -> Callable[[np.ndarray, int], Awaitable[bytes]]:
    """Entries of `data` that carry the picture itself."""

    async def encode_item(pixels: np.ndarray, seed: int) -> bytes:
        return await encoder.base64(pixels, style.image_format, *json_around_image({"seed": seed}))

    return encode_item


def url_items(
    encoder: ImageEncoder, files: FileStore, style: AnswerStyle, url_of: Callable[[str], str]
) -> Callable[[np.ndarray, int], Awaitable[bytes]]:
    """Entries of `data` that link to a stored file; `url_of` makes the link from the file's id."""

    async def encode_item(pixels: np.ndarray, seed: int) -> bytes:
        data = await encoder.file(pixels, style.image_format)
        url = url_of(files.put(data, style.image_format.content_type))
        return ImageData(url=url, seed=seed).model_dump_json(exclude_none=True).encode()

    return encode_item
