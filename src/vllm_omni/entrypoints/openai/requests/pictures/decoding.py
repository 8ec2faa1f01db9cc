"""From picture files to pixels: the code that a decode process runs, and `data:` URLs.

`decode_image` runs in the calling process. The server decodes in processes that it can kill: see `pool.py`.
"""

from __future__ import annotations

import binascii
import io
import warnings
from dataclasses import dataclass

from PIL import Image

from vllm_omni.entrypoints.openai.requests.pictures.files import jpeg, png, webp
from vllm_omni.entrypoints.openai.requests.pictures.files.base import PictureFile, broken
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import check_input_image, to_rgb

# EXIF's orientation -> transpose that turns the picture upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_MAX_URL_QUOTE = 40
# Decoding one chunk holds the interpreter lock for about a millisecond; a multiple of 4.
_BASE64_CHUNK = 2**20


@dataclass(frozen=True)
class OpenedImage:
    """A picture with its header read and its pixels not decoded yet."""

    image: Image.Image
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the upright picture."""
        width, height = self.image.size
        return (height, width) if self.orientation in _SWAPS_SIDES else (width, height)

    def decoded(self) -> Image.Image:
        """Decode to RGB: turned upright, on white where the picture is transparent. Raises InvalidRequestError."""
        try:
            self.image.load()
            turn = _TURNS.get(self.orientation)
            return to_rgb(self.image if turn is None else self.image.transpose(turn))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds for a broken picture
            raise broken(str(self.image.format)) from error


def open_image(data: bytes) -> OpenedImage:
    """Read the header of a picture file. Raises InvalidRequestError for other formats and broken or too large files."""
    file = read_file(data)
    try:
        with warnings.catch_warnings(action="ignore"):  # a client's file must not write to the log
            image = Image.open(io.BytesIO(file.data), formats=(file.format,))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for a broken picture
        raise broken(file.format) from error
    check_input_image(image)
    return OpenedImage(image, file.orientation)


def read_file(data: bytes) -> PictureFile:
    """Parts of a picture file that determine its pixels. Raises InvalidRequestError."""
    if data.startswith(png.SIGNATURE):
        return png.read_png(data)
    if data.startswith(jpeg.SIGNATURE):
        return jpeg.read_jpeg(data)
    if webp.is_webp(data):
        return webp.read_webp(data)
    raise InvalidRequestError("image takes PNG, JPEG and WebP files; this is none", param="image")


def decode_image(data: bytes) -> Image.Image:
    """Decode a picture file to RGB: turned upright, on white where it is transparent.

    Raises InvalidRequestError for other formats, files that are broken or incomplete, and too many pixels.
    """
    return open_image(data).decoded()


def data_url_bytes(url: str) -> bytes:
    """The file in a `data:` URL. Raises InvalidRequestError."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequestError(
            f"image_url takes data:TYPE;base64,... URLs, got {url[:_MAX_URL_QUOTE]!r}", param="image_url"
        )
    try:
        chunks = (body[i : i + _BASE64_CHUNK] for i in range(0, len(body), _BASE64_CHUNK))
        return b"".join(binascii.a2b_base64(chunk, strict_mode=True) for chunk in chunks)
    except ValueError as error:  # from binascii, or for text that is not ASCII
        raise InvalidRequestError(f"image_url is not valid base64: {error}", param="image_url") from error
