"""Weight files of a variant, beside files without one or alone: pictures equal those of diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from testbed.runner_driver import psnr, quick_executor
from testbed.tiny_diffusers import build_tiny_diffusers
from testbed.tiny_models import SMALL, build_tiny_qwen_image
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

PROMPT = "a red apple"
SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "packed": (lambda path: build_tiny_qwen_image(path, default_sampling_params=SMALL), SIZE),
    "whole": (
        lambda path: build_tiny_diffusers("StableDiffusion3Pipeline", path),
        {**SIZE, "guidance_scale": 1.0, "max_sequence_length": 64},
    ),
}


def add_half_variant(folder: Path) -> None:
    """Write other weights to `folder` as files of the variant fp16, as diffusers writes them, some in shards."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(0.8)
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size="200KB")
    assert len([*folder.glob("transformer/*.fp16-*.safetensors")]) > 1


def drawn_by_diffusers(folder: Path, variant: str | None, arguments: dict[str, Any]) -> np.ndarray:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, variant=variant, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    return np.array(pipeline(PROMPT, generator=generator, **arguments).images[0])


def drawn(folder: Path, variant: str | None, arguments: dict[str, Any]) -> np.ndarray:
    with (
        patch("vllm_omni.omni.make_executor", quick_executor),
        Omni(
            model=str(folder), variant=variant, dtype="float32", distributed_executor_backend="uni", progress_bar=False
        ) as omni,
    ):
        params = OmniDiffusionSamplingParams(seed=7, **arguments)
        return np.array(omni.generate(PROMPT, params)[0].images[0])


@pytest.mark.parametrize(("build", "arguments"), CASES.values(), ids=CASES)
def test_pictures_of_each_variant_equal_those_of_diffusers(
    build: Callable[[Path], Path], arguments: dict[str, Any], tmp_path: Path
) -> None:
    both = build(tmp_path / "both")
    plain_files = [*both.glob("*/*.safetensors")]
    add_half_variant(both)
    alone = shutil.copytree(both, tmp_path / "alone")
    for file in plain_files:
        (alone / file.relative_to(both)).unlink()
    plain, half = (drawn_by_diffusers(both, variant, arguments) for variant in (None, "fp16"))
    assert psnr(plain, half) < 40
    assert psnr(drawn(both, None, arguments), plain) >= 60
    assert psnr(drawn(both, "fp16", arguments), half) >= 60
    assert psnr(drawn(alone, "fp16", arguments), half) >= 60
