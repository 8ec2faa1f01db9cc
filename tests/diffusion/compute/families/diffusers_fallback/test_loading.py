"""Models of a whole pipeline that do not fit their configs are refused by name, not filled with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config

from tests.broken_folders import Breakage, values, weights
from tests.diffusion.compute.families.diffusers_fallback.conftest import ModelOf
from vllm_omni.diffusion.catalog.weight_files import stored_weights
from vllm_omni.diffusion.compute.families.diffusers_fallback.loading import load_pipeline
from vllm_omni.diffusion.compute.weights.stored_shapes import check_stored_shapes
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
            f"{LANGUAGE}: {LANGUAGE_BIAS} has shape (5,), by config.json it is (64,)",
        ),
        (
            weights(DENOISER, lambda w: w.update({DENOISER_BIAS: np.zeros(5, np.float32)})),
            f"{DENOISER}: {DENOISER_BIAS} has shape (5,), by config.json it is (48,)",
        ),
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


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (values("text_encoder/config.json", hidden_size=4_000_000), "text_encoder/model.safetensors: "),
        (values("text_encoder/config.json", vocab_size=10**12), "text_encoder/model.safetensors: "),
        (values("text_encoder/config.json", max_position_embeddings=10**9), "text_encoder/model.safetensors: "),
        (values("text_encoder_3/config.json", num_heads=10**9), "text_encoder_3/model.safetensors: "),
        (values("transformer/config.json", num_attention_heads=10**5), f"{DENOISER}: "),
        (values("transformer/config.json", joint_attention_dim=10**12), f"{DENOISER}: "),
        (values("vae/config.json", latent_channels=10**9), "vae/diffusion_pytorch_model.safetensors: "),
    ],
)
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(
    breakage: Breakage, words: str, model_of: ModelOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    breakage(folder)
    with pytest.raises(ConfigError, match=f"^{words}[a-z].* has shape .*, by config.json it is "):
        load_pipeline(folder, PIPELINE, torch.float32, None)


def test_a_model_far_larger_than_its_files_is_refused_whatever_its_weights_are_called(
    model_of: ModelOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    weights(LANGUAGE, lambda w: [w.update({f"old.{name}": w.pop(name)}) for name in sorted(w)])(folder)
    values("text_encoder/config.json", hidden_size=4_000_000)(folder)
    with pytest.raises(
        ConfigError, match=r"^text_encoder/config.json: the CLIPTextModelWithProjection would have \d+ "
    ):
        load_pipeline(folder, PIPELINE, torch.float32, None)


def test_a_weight_that_cannot_be_counted_is_refused(model_of: ModelOf, tmp_path: Path) -> None:
    folder = shutil.copytree(model_of(PIPELINE), tmp_path / "model")
    values("transformer/config.json", num_attention_heads=10**9)(folder)
    with pytest.raises(
        ConfigError, match=r"^transformer/config.json: no memory could hold the SD3Transformer2DModel: "
    ):
        load_pipeline(folder, PIPELINE, torch.float32, None)


class LooksAtValues(AutoencoderKL):  # type: ignore[misc]
    """A class that cannot be built without memory."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        assert torch.arange(3).sum().item() == 3


def test_a_class_that_needs_memory_to_be_built_is_left_to_the_library(model_of: ModelOf) -> None:
    folder = model_of(PIPELINE) / "vae"
    check_stored_shapes(LooksAtValues, folder, stored_weights(folder))
