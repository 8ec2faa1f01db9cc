"""PNG files are read back as they were, and are no larger than what Pillow writes in several times the time."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vllm_omni.entrypoints.openai.png import png


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(data: bytes) -> np.ndarray:
    Image.open(io.BytesIO(data)).verify()  # checksums, which reading alone leaves out
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.array(image)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (2, 3), (64, 96), (300, 200)])
def test_pixels_come_back(size: tuple[int, int]) -> None:
    for pixels in (noise(*size), np.zeros((*size, 3), np.uint8), np.full((*size, 3), 255, np.uint8)):
        assert np.array_equal(read(png(pixels)), pixels)


def test_the_memory_of_pixels_may_lie_in_any_order() -> None:
    pixels = noise(40, 60).transpose(1, 0, 2)[::-2]
    assert not pixels.flags.c_contiguous
    assert np.array_equal(read(png(pixels)), pixels)


def test_photographs_make_files_of_pillows_size() -> None:
    blurred = Image.fromarray(noise(256, 256)).filter(ImageFilter.GaussianBlur(3))
    grain = np.random.default_rng(1).normal(0, 3, (256, 256, 3))
    for pixels in (np.array(blurred), np.clip(np.array(blurred) + grain, 0, 255).astype(np.uint8)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        assert len(png(pixels)) < 1.1 * file.tell()
