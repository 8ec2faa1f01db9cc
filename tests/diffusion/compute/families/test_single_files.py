"""Pictures with the transformer from a single file equal those of diffusers' own `from_single_file`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from testbed.runner_driver import psnr, quick_executor
from testbed.single_files import (
    expanded,
    folder_weights,
    remove_weights,
    save,
    scaled_float8,
    with_own_names,
    with_prefix,
)
from testbed.tiny_models import build_tiny_qwen_image, photo
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

PROMPT = "a red apple"
SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
SMALL_VIDEO: dict[str, object] = {"height": 32, "width": 32, "num_frames": 5}
"""Defaults, by whose size a start measures."""
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": build_tiny_qwen_image,
    "z_image": build_tiny_z_image,
    "wan": partial(build_tiny_wan, default_sampling_params=SMALL_VIDEO),
}
MARKED_FAMILIES = ["qwen_image", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("z_image", "wan"))]
CLASSES = {
    "qwen_image": "QwenImageTransformer2DModel",
    "z_image": "ZImageTransformer2DModel",
    "wan": "WanTransformer3DModel",
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "qwen_image": {},
    "z_image": {"guidance_scale": 0.0},
    "wan": {"num_frames": 1, "guidance_scale": 1.0},
}


def drawn(folder: Path, arguments: dict[str, Any], prompt: Any = PROMPT, **settings: Any) -> np.ndarray:
    params = OmniDiffusionSamplingParams(seed=7, **SIZE, **arguments)
    with (
        patch("vllm_omni.omni.make_executor", quick_executor),
        Omni(
            model=str(folder), dtype="float32", distributed_executor_backend="uni", progress_bar=False, **settings
        ) as omni,
    ):
        return np.array(omni.generate(prompt, params)[0].images[0])


def drawn_by_diffusers(folder: Path, arguments: dict[str, Any], **transformers: Any) -> np.ndarray:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.register_modules(**transformers)  # WanPipeline.from_pretrained ignores them
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(PROMPT, generator=torch.Generator().manual_seed(7), output_type="np", **SIZE, **arguments)
    picture = output.images[0] if hasattr(output, "images") else output.frames[0][0]
    rounded: np.ndarray = (picture * 255).round().astype(np.uint8)
    return rounded


def single_file_of(family: str, folder: Path, file: Path, component: str = "transformer") -> Any:
    cls = getattr(diffusers, CLASSES[family])
    return cls.from_single_file(str(file), config=str(folder), subfolder=component, local_files_only=True)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_picture_equals_that_of_diffusers(family: str, tmp_path: Path) -> None:
    """The model folder has no weights of the transformer; the file is named by a link."""
    folder = BUILDERS[family](tmp_path / "model")
    named = with_own_names(family, folder_weights(folder))
    # diffusers removes no prefix of Qwen-Image's names.
    theirs = single_file_of(family, folder, save(named, tmp_path / "theirs.safetensors"))
    wanted = drawn_by_diffusers(folder, ARGUMENTS[family], transformer=theirs)
    save(with_prefix(named, "model.diffusion_model."), tmp_path / "blob.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to("blob.safetensors")
    remove_weights(folder)
    assert psnr(drawn(folder, ARGUMENTS[family], transformer_file=link), wanted) >= 60


@pytest.mark.thorough
def test_an_edit_equals_that_of_the_folder(tmp_path: Path) -> None:
    folder = build_tiny_qwen_image(tmp_path / "model", edit="QwenImageEditPlusPipeline", zero_cond_t=True)
    prompt = {"prompt": PROMPT, "multi_modal_data": {"image": photo(90, 60, 1)}}
    wanted = drawn(folder, {}, prompt)
    marked = folder_weights(folder) | {"__index_timestep_zero__": torch.zeros(1)}
    file = save(with_prefix(marked, "model.diffusion_model."), tmp_path / "edit.safetensors")
    remove_weights(folder)
    assert np.array_equal(drawn(folder, {}, prompt, transformer_file=file), wanted)


@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_a_float8_file_on_a_cpu_draws_what_its_expanded_weights_draw(family: str, tmp_path: Path) -> None:
    folder = BUILDERS[family](tmp_path / "model")
    weights = folder_weights(folder)
    stored = scaled_float8(with_own_names(family, weights), lambda name: True)
    plain = single_file_of(family, folder, save(expanded(stored), tmp_path / "plain.safetensors"))
    wanted = drawn_by_diffusers(folder, ARGUMENTS[family], transformer=plain)
    exact = drawn_by_diffusers(folder, ARGUMENTS[family])
    file = save(with_prefix(stored, "diffusion_model."), tmp_path / "fp8.safetensors")
    remove_weights(folder)
    picture = drawn(folder, ARGUMENTS[family], transformer_file=file)
    assert psnr(picture, wanted) >= 60
    assert psnr(picture, exact) < 60, "float8 changes the picture"
    in_float8 = drawn(folder, ARGUMENTS[family], transformer_file=file, quantization="fp8")
    assert 25 < psnr(in_float8, wanted) < 60, "activations are rounded, too"


@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(("transformer",), marks=pytest.mark.thorough),
        pytest.param(("transformer_2",), marks=pytest.mark.thorough),
        ("transformer", "transformer_2"),
    ],
)
def test_each_of_two_transformers_may_come_from_a_file(replaced: tuple[str, ...], tmp_path: Path) -> None:
    folder = build_tiny_wan(tmp_path / "model", "t2v-a14b", default_sampling_params=SMALL_VIDEO)
    arguments = ARGUMENTS["wan"]
    settings: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for number, component in enumerate(replaced):
        changed = {name: weight * (0.8 - number / 10) for name, weight in folder_weights(folder, component).items()}
        file = save(with_own_names("wan", changed), tmp_path / f"{component}.safetensors")
        settings["transformer_file" if component == "transformer" else "transformer_file_2"] = str(file)
        theirs[component] = single_file_of("wan", folder, file, component)
    unchanged = drawn_by_diffusers(folder, arguments)
    wanted = drawn_by_diffusers(folder, arguments, **theirs)
    for component in replaced:
        remove_weights(folder, component)
    assert psnr(wanted, unchanged) < 40
    assert psnr(drawn(folder, arguments, **settings), wanted) >= 60
