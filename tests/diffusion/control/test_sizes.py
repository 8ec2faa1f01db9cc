"""Sizes: the nearest valid one to one that is not, and the largest of a picture's proportions."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from vllm_omni.diffusion.compute.families.qwen_image.edit import EditInput
from vllm_omni.diffusion.control.sizes import SizeLimits
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import prepare_image

LIMITS = SizeLimits(16, 512 * 512, 512 * 512)
MEGAPIXEL = SizeLimits(16, 1024 * 1024, 1024 * 1024)
SHORT = SizeLimits(16, 512 * 512, 768)


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [
        (64, 8, (64, 16)),
        (64, 90, (64, 96)),
        (72, 64, (80, 64)),
        (1024, 1024, (512, 512)),
        (2048, 512, (1024, 256)),
        (10**400, 64, (65536, 16 * 4)),
        (16, 10**6, (16, 16384)),
    ],
)
def test_the_nearest_size_is_valid(height: int, width: int, nearest: tuple[int, int]) -> None:
    rows, columns = LIMITS.nearest(height, width)
    LIMITS.check(rows, columns)
    if height != 10**400:
        assert (rows, columns) == nearest


@pytest.mark.parametrize(
    ("photo", "own", "size"),
    [
        ((1600, 1200), (1184, 896), (1168, 880)),  # own: what diffusers makes of it, 1.2 % more than a megapixel
        ((1200, 1600), (896, 1184), (880, 1168)),
        ((1000, 1000), (1024, 1024), (1024, 1024)),
    ],
)
def test_a_photo_is_edited_within_the_models_own_area(
    photo: tuple[int, int], own: tuple[int, int], size: tuple[int, int]
) -> None:
    edits = EditInput(Path("nowhere"), len, 1024 * 1024, is_plus=False)
    height, width = edits.output_size([prepare_image(Image.new("RGB", photo), edits.sizes)])
    assert (width, height) == own
    assert SizeLimits(16, own[0] * own[1], 1184).fit(height, width) == (height, width)
    assert MEGAPIXEL.fit(height, width) == (size[1], size[0])


@pytest.mark.parametrize("limits", [LIMITS, SHORT])
def test_what_is_shrunk_is_valid_in_proportion_and_as_large_as_can_be(limits: SizeLimits) -> None:
    for rows, columns in product(range(1, 400, 7), repeat=2):
        ratio = max(rows, columns) / min(rows, columns)
        if limits is SHORT and ratio > 48:
            with pytest.raises(InvalidRequestError, match="and 768 a side"):
                limits.fit(rows * 16, columns * 16)
            continue
        height, width = limits.fit(rows * 16, columns * 16)
        limits.check(height, width)
        if height * width < rows * columns * 256:
            short, long = sorted((height, width))
            assert abs(long - short * ratio) <= 16, "a multiple off"
            more = short + 16
            assert more**2 * ratio > limits.max_pixels or more * ratio > limits.max_side, "a larger one has room"


def test_a_side_may_have_a_bound() -> None:
    assert SHORT.nearest(4096, 64) == (768, 64)
    with pytest.raises(InvalidRequestError, match=r"784x64: sides may have up to 768 pixels .* is 768x64$") as caught:
        SHORT.check(64, 784)
    assert caught.value.param == "width"
    assert SHORT.fit_side(16, 1024) == 768


def test_proportions_without_a_size_are_the_pictures_fault() -> None:
    assert LIMITS.fit(16, 512 * 512 // 16) == (16, 512 * 512 // 16)
    with pytest.raises(InvalidRequestError, match="as 16400x16 has them") as caught:
        LIMITS.fit(16, 16400)
    assert caught.value.param == "image"


def test_a_side_beside_one_that_is_asked_for() -> None:
    assert LIMITS.fit_side(1024, 512) == 256
    assert LIMITS.fit_side(1000, 512) == 256
    assert LIMITS.fit_side(64, 512) == 512
    assert LIMITS.fit_side(10**400, 512) == LIMITS.fit_side(512 * 512, 512) == 16
    assert LIMITS.fit_side(-1, 512) == 512
