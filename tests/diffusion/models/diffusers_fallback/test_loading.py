"""Models of a whole pipeline that do not fit their configs are refused by name, not filled with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.broken_folders import Breakage, values, weights
from tests.diffusion.models.diffusers_fallback.conftest import ModelOf
from vllm_omni.diffusion.models.diffusers_fallback.loading import load_pipeline
from vllm_omni.errors import ConfigError

PIPELINE = "StableDiffusion3Pipeline"
DENOISER = "transformer/diffusion_pytorch_model.safetensors"
LANGUAGE = "text_encoder/model.safetensors"
DENOISER_BIAS = "transformer_blocks.0.attn.to_q.bias"
LANGUAGE_BIAS = "text_model.encoder.layers.0.mlp.fc1.bias"
LACKS = "lacks 1 weights of the "


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (weights(DENOISER, lambda w: w.pop(DENOISER_BIAS)), f"transformer/ {LACKS}SD3Transformer2DModel, among them "),
        (
            weights(LANGUAGE, lambda w: w.pop(LANGUAGE_BIAS)),
            f"text_encoder/ {LACKS}CLIPTextModelWithProjection, among ",
        ),
        (
            weights(LANGUAGE, lambda w: w.update({LANGUAGE_BIAS: np.zeros(5, np.float32)})),
            f"text_encoder/: {LANGUAGE_BIAS} has shape (5,), by config.json it is (64,)",
        ),
        (weights(DENOISER, lambda w: w.update({DENOISER_BIAS: np.zeros(5, np.float32)})), f"{DENOISER_BIAS} expected"),
        (
            values("text_encoder/config.json", hidden_size="x"),
            "text_encoder/: the CLIPTextModelWithProjection cannot be",
        ),
        (values("scheduler/scheduler_config.json", shift="x"), f"diffusers cannot load the {PIPELINE}: "),
    ],
)
def test_what_does_not_fit_is_one_line(breakage: Breakage, words: str, model_of: ModelOf, tmp_path: Path) -> None:
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    breakage(folder)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(folder, PIPELINE, torch.float32, None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
