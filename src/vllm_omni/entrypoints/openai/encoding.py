"""Pixels to PNG, JPEG or WebP and on to JSON, in threads: the event loop only hands bytes over."""

from __future__ import annotations

import asyncio
import io
import json
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vllm_omni.entrypoints.openai.protocol import OutputFormat
from vllm_omni.errors import InvalidRequestError

CONTENT_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_SIDES: dict[OutputFormat, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
"""Longest side in pixels that each format can hold."""

# Base64 of one chunk holds the interpreter lock for about a millisecond; a multiple of 3 needs no padding.
_BASE64_CHUNK = 3 * 2**18
# Measured on drawings and grainy photographs: about twice as fast as zlib's default, files 12 to 15 % larger. With runs
# alone (zlib.Z_RLE) photographs take another 30 % less time, but a page of text four times the room.
_PNG_COMPRESS_LEVEL = 1
# From this quality on colour keeps its full resolution.
_FULL_COLOUR_QUALITY = 90


@dataclass(frozen=True)
class ImageFormat:
    name: OutputFormat
    quality: int
    """0-100, for jpeg and webp."""

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.name]

    def check_size(self, height: int, width: int) -> None:
        """Raises InvalidRequestError for pictures that the format cannot hold."""
        if max(height, width) > (longest := MAX_SIDES[self.name]):
            raise InvalidRequestError(
                f"size {width}x{height}: {self.name} takes sides of at most {longest} pixels; use png", param="size"
            )


def encode(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """The file of uint8 `pixels` [height, width, 3]."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if image_format.name == "png":
        image.save(file, "PNG", compress_level=_PNG_COMPRESS_LEVEL)
    elif image_format.name == "jpeg":
        full_colour = image_format.quality >= _FULL_COLOUR_QUALITY
        image.save(file, "JPEG", quality=image_format.quality, subsampling="4:4:4" if full_colour else "4:2:0")
    else:
        image.save(file, "WEBP", quality=image_format.quality)
    return file.getvalue()


def json_with_image(image: bytes, fields: Mapping[str, Any]) -> bytes:
    """`{"b64_json": <image>, **fields}` as JSON, without running a JSON encoder over megabytes of base64."""
    assert fields
    rest = json.dumps(fields, separators=(",", ":")).encode()
    return base64_between(b'{"b64_json":"', image, b'",' + rest[1:])


def base64_between(before: bytes, data: bytes, after: bytes) -> bytes:
    chunks = (b64encode(data[i : i + _BASE64_CHUNK]) for i in range(0, len(data), _BASE64_CHUNK))
    return b"".join((before, *chunks, after))


class ImageEncoder:
    """A bounded pool of encoding threads; `on_encoded` gets the seconds of each picture, on the event loop."""

    def __init__(self, num_threads: int, on_encoded: Callable[[float], None]) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="omni-encode")
        self._on_encoded = on_encoded

    async def file(self, pixels: np.ndarray, image_format: ImageFormat) -> bytes:
        return await self._timed(encode, pixels, image_format)

    async def json(self, pixels: np.ndarray, image_format: ImageFormat, fields: Mapping[str, Any]) -> bytes:
        """The picture inside a JSON object, beside `fields`."""
        return await self._timed(lambda: json_with_image(encode(pixels, image_format), fields))

    async def data_url(self, pixels: np.ndarray, image_format: ImageFormat, before: bytes, after: bytes) -> bytes:
        """The picture as a `data:` URL between two pieces of JSON."""
        before += f"data:{image_format.content_type};base64,".encode()
        return await self._timed(lambda: base64_between(before, encode(pixels, image_format), after))

    async def _timed(self, function: Callable[..., bytes], *args: Any) -> bytes:
        start = time.monotonic()
        data = await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        self._on_encoded(time.monotonic() - start)
        return data

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
