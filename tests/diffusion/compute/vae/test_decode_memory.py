"""Predicted bytes of decodes and encodes against those that tensors hold at the peak, also at the published sizes.

Tensors of the meta device have sizes and no values, so a decode of 2048x2048 takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn

from testbed.live_bytes import LiveBytes
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageVaeConfig
from vllm_omni.diffusion.compute.families.qwen_image.vae import QwenImageDecoder, QwenImageEncoder
from vllm_omni.diffusion.compute.families.wan.config import WanVaeConfig
from vllm_omni.diffusion.compute.families.wan.vae import ConditioningVideo, WanDecoder, WanEncoder
from vllm_omni.diffusion.compute.families.z_image.config import ZImageVaeConfig
from vllm_omni.diffusion.compute.families.z_image.vae import ZImageDecoder
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures

META = torch.device("meta")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
SMALL = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
WIDER = {**SMALL, "base_dim": 48}
WAN_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
KL = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024}
WIDER_KL = {"block_out_channels": [48, 96, 96, 96], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128}
SMALL_KL = {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128}


def peak_of(model: nn.Module, run: Callable[[], object]) -> int:
    """Most bytes that tensors hold at once while `run` runs, without the weights of `model`."""
    weights = [*model.parameters(), *model.buffers()]
    with torch.inference_mode(), LiveBytes(weights, weights[0].device.type) as live:
        run()
    return int(live.peak)


def tokens(height: int, width: int, channels: int, num_frames: int = 1, side: int = 16) -> torch.Tensor:
    return torch.empty((num_frames * (height // side) * (width // side), 4 * channels))


def make(cls: Any, dtype: torch.dtype, **sizes: Any) -> Any:
    vae = cls(**sizes)
    nn.Module.to(vae, dtype)  # diffusers' own warns
    return vae.eval().requires_grad_(False)


@DTYPES
@pytest.mark.parametrize(
    ("sizes", "height", "width", "tile"), [({}, 2048, 1024, False), (SMALL, 128, 160, False), (WIDER, 384, 160, True)]
)
def test_qwen_image(sizes: dict[str, Any], height: int, width: int, tile: bool, dtype: torch.dtype) -> None:
    config = QwenImageVaeConfig.from_dict(sizes)
    with META:
        vae = make(AutoencoderKLQwenImage, dtype, **sizes)
        decode = QwenImageDecoder(vae, True, tile, DecodeGroup.alone())
        latents, grid = tokens(height, width, 16), (1, height // 16, width // 16)
        peak = peak_of(vae, lambda: decode([latents], [grid]))
    assert config.decode_bytes(height, width, 1, tile, dtype.itemsize) == pytest.approx(peak, rel=0.1 if tile else 0.05)


@DTYPES
def test_an_encode_needs_less(dtype: torch.dtype) -> None:
    picture = np.zeros((128, 128, 3), np.uint8)
    vae = make(AutoencoderKLQwenImage, dtype, **SMALL)
    peak = peak_of(vae, lambda: QwenImageEncoder(vae)(picture))
    assert 0.5 < peak / QwenImageVaeConfig.from_dict(SMALL).decode_bytes(128, 128, 1, False, dtype.itemsize) < 1
    wan = make(AutoencoderKLWan, torch.float32, **SMALL)
    peak = peak_of(wan, lambda: ConditioningVideo(WanEncoder(wan), 9, picture[:64, :64]).finish())
    assert 0.5 < peak / WanVaeConfig.from_dict(SMALL).decode_bytes(64, 64, 9, False, 4) < 1


@DTYPES
@pytest.mark.parametrize(
    ("sizes", "height", "width", "tile"),
    [(KL, 2048, 1024, False), (SMALL_KL, 128, 160, False), (WIDER_KL, 192, 96, True)],
)
def test_z_image(sizes: dict[str, Any], height: int, width: int, tile: bool, dtype: torch.dtype) -> None:
    fields = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16, **sizes}
    config = ZImageVaeConfig.from_dict(fields)
    with META:
        vae = make(
            AutoencoderKL,
            dtype,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **fields,
        )
        decode = ZImageDecoder(vae, True, tile, DecodeGroup.alone())
        latents, grid = tokens(height, width, 16), (1, height // 16, width // 16)
        peak = peak_of(vae, lambda: decode([latents], [grid]))
    assert config.decode_bytes(height, width, 1, tile, dtype.itemsize) == pytest.approx(peak, rel=0.1 if tile else 0.06)


@pytest.mark.parametrize("sizes", [{}, WAN_5B], ids=["wan21", "5B"])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_wan(sizes: dict[str, Any], num_frames: int) -> None:
    height, width = 480, 832
    config = WanVaeConfig.from_dict(sizes)
    with META:
        vae = make(AutoencoderKLWan, torch.float32, **sizes)
        decode = WanDecoder(vae, False, DecodeGroup.alone())
        side = 2 * config.scale_factor_spatial
        grid = 1 + (num_frames - 1) // 4, height // side, width // side
        latents = torch.empty((math.prod(grid), 4 * config.z_dim))
        features: DecoderFeatures = {}

        def run() -> None:
            for frame in range(grid[0]):
                decode.decode_next(latents, grid, range(frame, frame + 1), features)

        peak = peak_of(vae, run)
    predicted = config.decode_bytes(height, width, num_frames, False, 2)
    if num_frames == 1:  # the features of the last layers are made after the peak
        assert 0.7 * predicted < peak <= predicted
    else:
        assert predicted == pytest.approx(peak, rel=0.05)


def test_tiles_are_those_of_diffusers() -> None:
    from vllm_omni.diffusion.compute.families.qwen_image import config as qwen_image
    from vllm_omni.diffusion.compute.families.wan import config as wan

    with META:
        for vae, side in ((AutoencoderKLQwenImage(), qwen_image.TILE_SIDE), (AutoencoderKLWan(), wan.TILE_SIDE)):
            assert vae.tile_sample_min_height == vae.tile_sample_min_width == side
