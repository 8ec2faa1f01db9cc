"""Uploaded pictures to what the model takes, in threads; headers are checked before pixels are touched."""

from __future__ import annotations

import asyncio
import binascii
import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import ExifTags, Image

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import MAX_INPUT_PIXELS, InputImage, check_input_image, to_rgb

Result = TypeVar("Result")

FORMATS = ("PNG", "JPEG", "WEBP")
# What Pillow's readers of these formats raise for files that are broken, one way or another.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# EXIF's orientation -> what brings the picture upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_URL_ECHO = 40
# Decoding one chunk holds the interpreter lock for about a millisecond; a multiple of 4.
_BASE64_CHUNK = 2**20


def decode_image(data: bytes | bytearray) -> Image.Image:
    """A picture as its file shows it: turned as its EXIF says, on white where it is transparent, RGB.

    Raises InvalidRequestError for other formats, files that are broken or cut off, and too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _BOMBS as error:  # what Pillow itself does not open: far beyond our limit
        raise InvalidRequestError(f"image takes at most {MAX_INPUT_PIXELS} pixels", param="image") from error
    except _BROKEN as error:
        raise InvalidRequestError("image takes PNG, JPEG and WebP files; this is none", param="image") from error
    check_input_image(image)
    try:
        return to_rgb(_upright(image))
    except (*_BOMBS, *_BROKEN) as error:
        raise InvalidRequestError(f"image is a broken {image.format} file", param="image") from error


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's own exif_transpose writes the whole EXIF anew as well, and stumbles where other tags of it are broken.
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def data_url_bytes(url: str) -> bytes:
    """The file in a `data:` URL. Raises InvalidRequestError."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequestError(
            f"image_url takes data:TYPE;base64,... URLs, got {url[:_MAX_URL_ECHO]!r}", param="image_url"
        )
    try:
        chunks = (body[i : i + _BASE64_CHUNK] for i in range(0, len(body), _BASE64_CHUNK))
        return b"".join(binascii.a2b_base64(chunk, strict_mode=True) for chunk in chunks)
    except ValueError as error:  # binascii's own, or text that is not ASCII
        raise InvalidRequestError(f"image_url is not valid base64: {error}", param="image_url") from error


class ImageDecoder:
    """A bounded pool of decoding threads, which also bring pictures to the sizes that the model takes."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="omni-decode")

    async def file(self, data: bytes | bytearray, prepare: Callable[[Image.Image], InputImage]) -> InputImage:
        """Raises InvalidRequestError."""
        return await self.run(lambda: prepare(decode_image(data)))

    async def data_url(self, url: str, prepare: Callable[[Image.Image], InputImage]) -> InputImage:
        """Raises InvalidRequestError."""
        return await self.run(lambda: prepare(decode_image(data_url_bytes(url))))

    async def run(self, function: Callable[[], Result]) -> Result:
        """The result of whatever else takes the time of a picture."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
