"""Finished pictures as OpenAI's response: fields around pixels."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.responses import StreamingResponse

from vllm_omni.entrypoints.openai.encoding import ImageEncoder, ImageFormat
from vllm_omni.entrypoints.openai.files import FileStore
from vllm_omni.entrypoints.openai.protocol import (
    ImageData,
    ImageEditRequest,
    ImageGenerationRequest,
    ImagesResponse,
    ReportedQuality,
    TokenDetails,
    Usage,
)
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

    @classmethod
    def of(cls, body: ImageGenerationRequest, image_format: ImageFormat) -> AnswerStyle:
        return cls(
            image_format,
            _REPORTED_QUALITY.get(body.quality, body.quality),
            body.safety_identifier,
            "image_edit" if isinstance(body, ImageEditRequest) else "image_generation",
        )

    def fields(self, pixels: np.ndarray) -> dict[str, Any]:
        """What responses and events say of a picture [height, width, 3]."""
        return {
            "background": "opaque",
            "output_format": self.image_format.name,
            "quality": self.quality,
            "size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        }


def usage(output: OmniRequestOutput) -> Usage:
    """Tokens of the prompt and of its input pictures, once, and of all that was made of them."""
    num_text, num_images = output.num_prompt_tokens, output.num_input_image_tokens
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
    """The JSON answer; `encode_item(pixels, seed)` makes one entry of its `data`.

    Sent in pieces: pictures can be many megabytes, and nothing copies or scans them on the event loop.
    """
    start = time.monotonic()
    items = await asyncio.gather(*(encode_item(p, s) for p, s in zip(output.images, output.seeds, strict=True)))
    seconds = time.monotonic() - start
    timings = {**output.timings, "media_encode": seconds, "total": output.timings.get("total", 0.0) + seconds}
    envelope = ImagesResponse(
        created=int(time.time()),
        usage=usage(output),
        timings=timings,
        safety_identifier=style.safety_identifier,
        data=[],
        **style.fields(output.images[0]),
    )
    head = json.dumps(envelope.model_dump(exclude={"data"}, exclude_none=True), separators=(",", ":")).encode()
    pieces = [head[:-1], b',"data":[', items[0], *(b"," + item for item in items[1:]), b"]}"]
    headers = {"content-length": str(sum(map(len, pieces)))}
    return StreamingResponse(_each(pieces), media_type="application/json", headers=headers)


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def base64_items(encoder: ImageEncoder, style: AnswerStyle) -> Callable[[np.ndarray, int], Awaitable[bytes]]:
    """Entries of `data` that carry the picture itself."""

    async def encode_item(pixels: np.ndarray, seed: int) -> bytes:
        return await encoder.json(pixels, style.image_format, {"seed": seed})

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
