"""Input pictures: what is taken, and how a model sees them (no torch here)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vllm_omni.errors import InvalidRequestError

MAX_INPUT_PIXELS = 2**25
"""Of one input picture (33 million): a picture of 8K or of a large camera."""
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""Pillow's, of 8 bits: others would have to be scaled, and nobody but the caller knows how."""


@dataclass(frozen=True)
class ReaderSizes:
    """(width, height) at which the two readers of an input picture take it."""

    condition: tuple[int, int]
    """Size for the text encoder."""
    reference: tuple[int, int]
    """Size for the VAE."""


@dataclass(frozen=True)
class InputImage:
    """A picture to edit, at the sizes that its two readers take. Equal to another one of the same pixels."""

    digest: str
    condition: np.ndarray = field(compare=False, repr=False)
    """uint8 [height, width, 3]: what the text encoder looks at."""
    reference: np.ndarray = field(compare=False, repr=False)
    """uint8 [height, width, 3]: what the VAE makes latents of."""

    @property
    def num_bytes(self) -> int:
        """In memory; most models have both readers look at one array."""
        return self.condition.nbytes + (0 if self.reference is self.condition else self.reference.nbytes)

    @classmethod
    def of(cls, condition: np.ndarray, reference: np.ndarray) -> InputImage:
        digest = hashlib.blake2b(digest_size=16)
        for pixels in (condition, reference):
            digest.update(repr(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels).data)
        return cls(digest.hexdigest(), condition, reference)


def resized_pixels(image: Image.Image, sizes: ReaderSizes) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [height, width, 3] of an RGB picture for each of its two readers; one array where they want the same."""
    reference = _pixels_at(image, sizes.reference)
    return reference if sizes.condition == sizes.reference else _pixels_at(image, sizes.condition), reference


def _pixels_at(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.array(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))


def prepare_image(image: Image.Image, sizes_of: Callable[[int, int], ReaderSizes]) -> InputImage:
    """A picture as a model takes it. `sizes_of`: `ImageInput.sizes` of the model.

    Raises InvalidRequestError.
    """
    check_input_image(image)
    sizes = sizes_of(image.width, image.height)
    return InputImage.of(*resized_pixels(to_rgb(image), sizes))


def resize_image(image: InputImage, height: int, width: int) -> InputImage:
    """For both readers at this size."""
    if image.reference.shape[:2] == (height, width):
        return image
    pixels = np.array(Image.fromarray(image.reference).resize((width, height), Image.Resampling.LANCZOS))
    return InputImage.of(pixels, pixels)


def check_input_image(image: Image.Image) -> None:
    """Raises InvalidRequestError for what is no picture, for too many pixels, and for modes that are not taken."""
    if not isinstance(image, Image.Image):
        raise InvalidRequestError(f"image takes PIL images, got {type(image).__name__}", param="image")
    check_num_pixels(image.width, image.height)
    if image.mode not in MODES:
        raise InvalidRequestError(f"image takes the modes {', '.join(MODES)}, got {image.mode}", param="image")


def check_num_pixels(width: int, height: int) -> None:
    """Raises InvalidRequestError for more than MAX_INPUT_PIXELS."""
    if (num_pixels := width * height) > MAX_INPUT_PIXELS:
        raise InvalidRequestError(
            f"image takes at most {MAX_INPUT_PIXELS} pixels, got {width}x{height} = {num_pixels}", param="image"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """On white where the picture is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")
