"""Edited pictures against diffusers' QwenImageEditPipeline and QwenImageEditPlusPipeline, made in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image

from testbed.runner_driver import Drive, psnr
from testbed.tiny_edit_models import (
    EDIT,
    PLUS,
    build,
    draw,
    reference,
    request_of,
    small_pictures,
)
from testbed.tiny_models import build_tiny_qwen_image, photo
from tests.diffusion.compute.families.qwen_image.test_pictures import check, started
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.qwen_image.vae import QwenImageEncoder
from vllm_omni.diffusion.compute.step.sampling import pack_latents
from vllm_omni.inputs.images import prepare_image

pytestmark = pytest.mark.usefixtures("module_on_one_thread")


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_pictures():
        yield


def test_a_mixed_batch_of_single_pictures(tmp_path: Path) -> None:
    path = build(tmp_path / "edit", EDIT, heads=3)
    pictures = {"guided": photo(90, 60, 1), "sized": photo(64, 64, 2), "tall": photo(20, 50, 3)}
    asked: dict[str, dict[str, Any]] = {
        "guided": {"negative_prompt": "a blue car", "seed": 3},
        "sized": {"height": 32, "width": 96, "num_inference_steps": 7, "seed": 2**40},
        "tall": {"negative_prompt": "", "true_cfg_scale": 2.5, "num_inference_steps": 2, "flow_shift": 3.0},
    }
    requests = {i: request_of(path, i, [picture], **asked[i]) for i, picture in pictures.items()}

    drive = Drive(started(path)).run({0: [requests["guided"], requests["sized"]], 1: [requests["tall"]]})

    assert drive.errors == {}
    assert max(drive.pack_sizes) == 5
    pipeline = reference(path)
    for name, request in requests.items():
        size = {"height": 32, "width": 96} if name == "sized" else {}
        check(drive.images[name], draw(pipeline, [pictures[name]], request, **size))


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_mixed_batch_of_several_pictures(tmp_path: Path, zero_cond_t: bool) -> None:
    path = build(tmp_path / "plus", PLUS, heads=5, zero_cond_t=zero_cond_t)
    one, two, three = photo(90, 60, 1), photo(64, 64, 2), photo(31, 70, 3)
    pictures = {
        "one": [one],
        "two": [two, three],
        "three": [three, one, two],
        "same size": [one, one],
        "own sigmas": [three],
    }
    asked = {
        "one": {"negative_prompt": "a blue car", "seed": 3},
        "two": {"prompt": "the apple of Picture 2", "num_inference_steps": 6, "seed": 4},
        "three": {"height": 48, "width": 80, "negative_prompt": " ", "true_cfg_scale": 1.5, "num_inference_steps": 3},
        "same size": {"prompt": "", "num_inference_steps": 2, "flow_shift": 3.0},
        "own sigmas": {"sigmas": (1.0, 0.6, 0.3), "num_inference_steps": 3},
    }
    requests = {i: request_of(path, i, images, **asked[i]) for i, images in pictures.items()}

    drive = Drive(started(path)).run({0: list(requests.values())[:2], 2: list(requests.values())[2:]})

    assert drive.errors == {}
    assert max(drive.pack_sizes) >= 5
    pipeline = reference(path)
    for name, request in requests.items():
        size = {"height": 48, "width": 80} if name == "three" else {}
        check(drive.images[name], draw(pipeline, pictures[name], request, **size))


def test_the_first_model_takes_one_picture_the_others_several(tmp_path: Path) -> None:
    inputs = [load_model_info(str(build(tmp_path / name, name))).image_input for name in (EDIT, PLUS)]
    assert [taken.max_images for taken in inputs if taken is not None] == [1, 16]


@torch.inference_mode()
def test_input_pictures_are_encoded_in_the_tiles_of_diffusers(tmp_path: Path) -> None:
    defaults: dict[str, object] = {"height": 288, "width": 288}
    path = build_tiny_qwen_image(tmp_path / "edit", edit=EDIT, default_sampling_params=defaults)
    edit = load_model_info(str(path)).image_input
    assert edit is not None
    image = prepare_image(photo(300, 270, 1), edit.sizes)
    pipeline = reference(path)
    pixels = pipeline.image_processor.preprocess(Image.fromarray(image.reference)).unsqueeze(2)
    vae = AutoencoderKLQwenImage.from_pretrained(path / "vae")
    encoder = QwenImageEncoder(vae)
    encoded = []
    for tiled in (False, True):
        if tiled:
            pipeline.vae.enable_tiling()
            vae.enable_tiling()
        wanted = pipeline._encode_vae_image(pixels, None)[0, :, 0]
        encoded.append(encoder(image.reference))
        torch.testing.assert_close(encoded[-1], pack_latents(wanted), atol=1e-3, rtol=1e-3)
    assert (encoded[0] - encoded[1]).abs().max() > 0.01, "tiling must show in this picture"


def test_slicing_keeps_the_picture(tmp_path: Path) -> None:
    path = build(tmp_path / "edit", EDIT)
    requests = [request_of(path, f"{i}", [photo(64, 64, i)], num_inference_steps=2) for i in range(3)]
    batched = Drive(started(path)).run({0: requests})
    sliced = Drive(started(path, vae_use_slicing=True)).run({0: requests})
    for request in requests:
        assert psnr(batched.images[request.request_id], sliced.images[request.request_id]) >= 60


@pytest.mark.thorough
def test_tiles_are_those_of_diffusers(tmp_path: Path) -> None:
    path = build(tmp_path / "edit", EDIT)
    picture, size = photo(64, 64, 1), {"height": 272, "width": 288}
    request = request_of(path, "large", [picture], num_inference_steps=1, sigmas=(0.9,), **size)
    drive = Drive(started(path, vae_use_tiling=True)).run({0: [request]})
    pipeline = reference(path)
    whole = draw(pipeline, [picture], request, **size)
    pipeline.vae.enable_tiling()
    tiled = draw(pipeline, [picture], request, **size)
    assert np.abs(whole - tiled).max() > 0.01, "tiling must show in this picture"
    check(drive.images["large"], tiled)


def test_in_half_precision(tmp_path: Path) -> None:
    """No tensor may have another dtype. The loss in the picture depends on the weights and is not bounded here."""
    path = build(tmp_path / "plus", PLUS, zero_cond_t=True)
    request = request_of(path, "half", [photo(90, 60, 1), photo(31, 70, 3)], negative_prompt="")
    half, whole = (Drive(started(path, dtype=dtype)).run({0: [request]}) for dtype in ("bfloat16", "float32"))
    assert half.errors == {}
    assert psnr(half.images["half"], whole.images["half"]) > 25
