"""Input pictures: limits, and their pixels at the sizes that a model reads. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vllm_omni.errors import InvalidRequestError

MAX_INPUT_PIXELS = 2**25
"""Most pixels of one input picture (33 million): an 8K picture or a large camera's."""
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""Accepted Pillow modes, all of 8 bits: others need a scale, which only the caller knows."""


@dataclass(frozen=True)
class ReaderSizes:
    """Sizes (width, height) at which the text encoder and the VAE read an input picture."""

    condition: tuple[int, int]
    """Size that the text encoder reads."""
    reference: tuple[int, int]
    """Size that the VAE encodes."""


@dataclass(frozen=True)
class InputImage:
    """A picture to edit, at the sizes that the text encoder and the VAE read. Equal if the pixels are equal."""

    digest: str
    condition: np.ndarray = field(compare=False, repr=False)
    """uint8 [height, width, 3]: pixels for the text encoder."""
    reference: np.ndarray = field(compare=False, repr=False)
    """uint8 [height, width, 3]: pixels for the VAE."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its pixels; for most models the text encoder and the VAE share one array."""
        return self.condition.nbytes + (0 if self.reference is self.condition else self.reference.nbytes)

    @classmethod
    def of(cls, condition: np.ndarray, reference: np.ndarray) -> InputImage:
        digest = hashlib.blake2b(digest_size=16)
        for pixels in (condition, reference):
            digest.update(repr(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels).data)
        return cls(digest.hexdigest(), condition, reference)


def resized_pixels(image: Image.Image, sizes: ReaderSizes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 [height, width, 3], for the text encoder and for the VAE; one array if their sizes are equal."""
    reference = _pixels_at(image, sizes.reference)
    return reference if sizes.condition == sizes.reference else _pixels_at(image, sizes.condition), reference


def _pixels_at(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.array(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))


def prepare_image(image: Image.Image, sizes_of: Callable[[int, int], ReaderSizes]) -> InputImage:
    """Check a picture and resize it for a model. `sizes_of`: `ImageInput.sizes` of the model.

    Raises InvalidRequestError.
    """
    check_input_image(image)
    sizes = sizes_of(image.width, image.height)
    return InputImage.of(*resized_pixels(to_rgb(image), sizes))


def resize_image(image: InputImage, height: int, width: int) -> InputImage:
    """Resize a picture to one size, in pixels, which the text encoder and the VAE then share."""
    if image.reference.shape[:2] == (height, width):
        return image
    pixels = resize_pixels(image.reference, height, width)
    return InputImage.of(pixels, pixels)


def resize_pixels(
    pixels: np.ndarray, height: int, width: int, method: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Resize uint8 [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), method))


def check_input_image(image: Image.Image) -> None:
    """Raise InvalidRequestError for an object that is no PIL image, for too many pixels, and for other modes."""
    if not isinstance(image, Image.Image):
        raise InvalidRequestError(f"image takes PIL images, got {type(image).__name__}", param="image")
    check_num_pixels(image.width, image.height)
    if image.mode not in MODES:
        raise InvalidRequestError(f"image takes the modes {', '.join(MODES)}, got {image.mode}", param="image")


def check_num_pixels(width: int, height: int) -> None:
    """Raise InvalidRequestError for more than MAX_INPUT_PIXELS."""
    if (num_pixels := width * height) > MAX_INPUT_PIXELS:
        raise InvalidRequestError(
            f"image takes at most {MAX_INPUT_PIXELS} pixels, got {width}x{height} = {num_pixels}", param="image"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, on white where the picture is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")
