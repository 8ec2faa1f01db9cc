"""Encoding of pixels as PNG, JPEG or WebP, and as base64 in JSON, in threads beside the event loop."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64
from PIL import Image

from vllm_omni.entrypoints.openai.responses.png import MapBands, encode_png
from vllm_omni.entrypoints.openai.schema.images import OutputFormat
from vllm_omni.errors import InvalidRequestError

CONTENT_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_SIDES: dict[OutputFormat, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
"""Longest side in pixels that each format can hold."""

# JPEG keeps the full resolution of colour from this quality on.
_FULL_COLOUR_QUALITY = 90


@dataclass(frozen=True)
class ImageFormat:
    name: OutputFormat
    quality: int
    """Quality of jpeg and webp, 0 to 100."""

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.name]

    def check_size(self, height: int, width: int) -> None:
        """Raise InvalidRequestError for a picture that the format cannot hold."""
        if max(height, width) > (longest := MAX_SIDES[self.name]):
            raise InvalidRequestError(
                f"size {width}x{height}: {self.name} takes sides of at most {longest} pixels; use png", param="size"
            )


def encode(pixels: np.ndarray, image_format: ImageFormat, map_bands: MapBands = map) -> bytes:
    """Encode uint8 `pixels` [height, width, 3] as a file; `map_bands`: see `encode_png`."""
    if image_format.name == "png":
        return encode_png(pixels, map_bands)
    image, file = Image.fromarray(pixels), io.BytesIO()
    if image_format.name == "jpeg":
        full_colour = image_format.quality >= _FULL_COLOUR_QUALITY
        image.save(file, "JPEG", quality=image_format.quality, subsampling="4:4:4" if full_colour else "4:2:0")
    else:
        image.save(file, "WEBP", quality=image_format.quality)
    return file.getvalue()


def json_around_image(fields: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """JSON before and after the base64 in `{"b64_json": <base64>, **fields}`.

    Joining these around the base64 is faster than a JSON encoder, which would scan megabytes of it.
    """
    assert fields
    rest = json.dumps(fields, separators=(",", ":")).encode()
    return b'{"b64_json":"', b'",' + rest[1:]


def base64_between(before: bytes, data: bytes, after: bytes) -> bytes:
    """Join `before`, `data` in base64 and `after`. For large data pybase64 and `join` release the GIL."""
    return b"".join((before, pybase64.b64encode(data), after))


class ImageEncoder:
    """A bounded pool of encoding threads. `on_encoded` is called on the event loop with the seconds of each picture.

    `num_band_threads` other threads encode the bands of all PNG files; an encoding thread waits for its bands.
    """

    def __init__(self, num_threads: int, num_band_threads: int, on_encoded: Callable[[float], None]) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="omni-encode")
        self._bands = ThreadPoolExecutor(num_band_threads, thread_name_prefix="omni-png-band")
        self._on_encoded = on_encoded

    async def file(self, pixels: np.ndarray, image_format: ImageFormat) -> bytes:
        """Encode uint8 `pixels` [height, width, 3] as a file."""
        return await self._timed(encode, pixels, image_format, self._bands.map)

    async def base64(self, pixels: np.ndarray, image_format: ImageFormat, before: bytes, after: bytes) -> bytes:
        """Encode `pixels` as a file in base64 between `before` and `after`, which are joined in the thread too."""
        return await self._timed(lambda: base64_between(before, encode(pixels, image_format, self._bands.map), after))

    async def _timed(self, function: Callable[..., bytes], *args: Any) -> bytes:
        start = time.monotonic()
        data = await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        self._on_encoded(time.monotonic() - start)
        return data

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._bands.shutdown(wait=False)  # encoding that has begun may finish
