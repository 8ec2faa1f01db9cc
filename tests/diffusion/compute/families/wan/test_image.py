"""CLIP's embeddings of input pictures against those of diffusers' pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from testbed.tiny_models import photo
from testbed.tiny_wan import IMAGE_DIM, IMAGE_SIDE, IMAGE_TOKENS
from vllm_omni.diffusion.compute.families.wan.image import WanImageEncoder
from vllm_omni.diffusion.compute.families.wan.image_input import WanImageInput
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import InputImage, prepare_image

CPU = torch.device("cpu")
RULES = WanImageInput(1, 2, 480 * 832, 16)
CLIP_RULES = replace(RULES, clip_side=IMAGE_SIDE)


def prepared(image: Image.Image) -> InputImage:
    """The picture for a video of 32x48 pixels."""
    return CLIP_RULES.fit(prepare_image(image, CLIP_RULES.sizes), 32, 48)


@pytest.mark.parametrize("sizes", [((64, 48),), ((33, 90), (121, 31)), ((9, 20), (400, 13))])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
@torch.inference_mode()
def test_embeddings_are_those_of_diffusers(
    wan_model: Callable[[str], Path], tmp_path: Path, sizes: tuple[tuple[int, int], ...], prefix: str
) -> None:
    path = shutil.copytree(wan_model("i2v-2.1"), tmp_path / "model")
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=None,
        image_encoder=CLIPVisionModel.from_pretrained(path / "image_encoder", dtype=torch.float32),
        image_processor=CLIPImageProcessorPil.from_pretrained(path / "image_processor"),
    )
    pictures = [photo(*size, seed) for seed, size in enumerate(sizes)]
    wanted = pipeline.encode_image(pictures, CPU).flatten(0, 1)
    file = path / "image_encoder" / "model.safetensors"
    save_file({prefix + name: weight for name, weight in load_file(file).items()}, file, {"format": "pt"})

    counted: list[int] = []
    encoder = WanImageEncoder(path, WeightReader(CPU, torch.float32, counted.append))
    got = encoder([prepared(picture) for picture in pictures])

    assert got.shape == (len(sizes) * IMAGE_TOKENS, IMAGE_DIM)
    assert sum(counted) > 0
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "output"),
    [(832, 480, (480, 832)), (4000, 3000, (544, 720)), (100, 100, (624, 624)), (3, 3000, (19984, 16))],
)
def test_a_video_has_the_proportions_of_its_first_picture(width: int, height: int, output: tuple[int, int]) -> None:
    pixels, other = (np.zeros((*size, 3), np.uint8) for size in ((height, width), (7, 9)))
    assert RULES.output_size([InputImage.of(pixels, pixels), InputImage.of(other, other)]) == output
    assert RULES.sizes(width, height).reference == (width, height)


def test_a_picture_is_resized_to_what_the_model_reads() -> None:
    original = photo(1600, 1200, 1)
    without = RULES.fit(prepare_image(original, RULES.sizes), 64, 96)
    assert without.condition is without.reference
    assert np.array_equal(without.reference, np.array(original.resize((96, 64), Image.Resampling.LANCZOS)))
    seen = prepared(original)
    assert seen.condition.shape == (IMAGE_SIDE, IMAGE_SIDE * 1600 // 1200, 3)
    assert seen.reference.shape == (32, 48, 3)
    assert seen.digest != CLIP_RULES.fit(prepare_image(original, CLIP_RULES.sizes), 32, 64).digest


def test_clip_takes_no_strip() -> None:
    RULES.sizes(3, 3000)
    CLIP_RULES.sizes(60, 3000)
    for size in ((3, 3000), (3000, 3)):
        with pytest.raises(InvalidRequestError, match=r"a ratio up to 50, got \d+x\d+$") as caught:
            CLIP_RULES.sizes(*size)
        assert caught.value.param == "image"
