"""Editing without a server, on a real (tiny) model in a worker process."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from testbed.runner_driver import quick_executor
from testbed.tiny_models import photo
from vllm_omni import AsyncOmni, Omni
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

PHOTO = photo(90, 60, 1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.thorough
def test_pictures_in_pictures_out(tiny_edit_model: Path) -> None:
    params = OmniDiffusionSamplingParams(num_inference_steps=3, true_cfg_scale=4.0, seed=1)
    edit = {"prompt": "make it sunset", "negative_prompt": "blurry", "multi_modal_data": {"image": PHOTO}}
    with Omni(model=str(tiny_edit_model), progress_bar=False) as omni:
        one, two, again, sized, clear = omni.generate(
            [
                edit,
                {**edit, "multi_modal_data": {"image": [PHOTO, photo(31, 70, 3)]}},
                {**edit, "multi_modal_data": {"image": [PHOTO]}},
                edit,
                {**edit, "multi_modal_data": {"image": PHOTO.convert("RGBA")}},
            ],
            [params, params, params, OmniDiffusionSamplingParams(width=48, height=32, num_inference_steps=1), params],
        )
    assert one.images[0].size == (64, 64)  # 90:60 in about 64 * 64 pixels, of sides that are multiples of 32
    assert two.images[0].size == (32, 96)  # the size of the last picture
    assert sized.images[0].size == (48, 32)
    assert np.array_equal(pixels(one.images[0]), pixels(again.images[0]))
    assert np.array_equal(pixels(one.images[0]), pixels(clear.images[0])), "an alpha of full cover changes nothing"
    assert (one.num_input_image_tokens, two.num_input_image_tokens) == (16, 16 + 12)
    assert pixels(one.images[0]).std() > 5


async def test_what_the_model_cannot_take_is_refused_by_name(tiny_edit_model: Path) -> None:
    with patch("vllm_omni.omni.make_executor", quick_executor):
        omni = AsyncOmni(model=str(tiny_edit_model), distributed_executor_backend="uni")
    await omni.start()
    try:
        for images, message in (
            ([], "this model edits pictures and got none; it takes them as multi_modal_data"),
            ([PHOTO] * 17, "at most 16 pictures on this model, got 17"),
            (["photo.png"], "image takes PIL images: open it first, .*got 'photo.png'"),
            (Image.new("I;16", (64, 64)), "image takes the modes RGB, .* got I;16"),
            (Image.new("RGB", (2010, 10)), "image takes sides of a ratio up to 200, got 2010x10"),
            (Image.new("1", (8192, 4097)), "image takes at most 33554432 pixels, got 8192x4097 = 33562624"),
        ):
            with pytest.raises(InvalidRequestError, match=message) as refused:
                omni.generate({"prompt": "x", "multi_modal_data": {"image": images}})
            assert refused.value.param == "image"
        with pytest.raises(InvalidRequestError, match="this model edits pictures and got none"):
            omni.generate("x")
    finally:
        await omni.close()
