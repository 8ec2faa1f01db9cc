"""Decodes that ranks share against diffusers' tiled decode by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.z_image.vae import ZImageDecoder
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.compute.step.sampling import unpack_latents
from vllm_omni.diffusion.data import DiffusionParallelConfig, KernelsName

GRIDS = [(4, 3), (7, 8), (7, 8), (1, 9), (11, 2)]
"""Rows and columns of tokens; a tile has 6 a side."""
FEW_GRIDS = [(1, 9), (7, 1)]
"""For kernels in Triton's interpreter, which is slow."""


def load(path: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(path / "vae").eval().requires_grad_(False)


def arrays(decode: ZImageDecoder, grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    return [picture.pixels.numpy() for picture in decode(tokens(grids), [(1, *grid) for grid in grids])]


def tokens(grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((rows * columns, 64), generator=generator) for rows, columns in grids]


def decode(
    world: World, path: Path, one_at_a_time: bool, kernels: KernelsName, grids: Sequence[tuple[int, int]]
) -> tuple[list[np.ndarray], dict[str, int]]:
    decoder = ZImageDecoder(load(path), one_at_a_time, False, world.mesh.vae, create_kernels(kernels))
    return arrays(decoder, grids), dict(world.sent)


@pytest.mark.parametrize(
    ("one_at_a_time", "kernels"),
    [(False, "torch"), (True, "torch"), pytest.param(False, "triton", marks=pytest.mark.thorough)],
)
def test_pictures_of_ranks_are_those_of_one_and_of_diffusers(
    turbo: Path, one_at_a_time: bool, kernels: KernelsName
) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=3, vae_patch_parallel_size=3)
    grids = FEW_GRIDS if kernels == "triton" else GRIDS
    (first, sent), *others = run_ranks(decode, parallel, turbo, one_at_a_time, kernels, grids)
    assert [pictures for pictures, _ in others] == [[], []]
    assert sent["all_to_all"] == 0, "only what other ranks decoded travels"
    alone = arrays(ZImageDecoder(load(turbo), one_at_a_time, True, DecodeGroup.alone()), grids)
    vae = load(turbo)
    vae.enable_tiling()
    for picture, by_one, latents, grid in zip(first, alone, tokens(grids), grids, strict=True):
        scaled = unpack_latents(latents, *grid, channels_last=True)[None] / 0.3611 + 0.1159
        pixels = vae.decode(scaled, return_dict=False)[0]
        by_diffusers = VaeImageProcessor().postprocess(pixels, output_type="np")[0]
        assert picture.shape == by_diffusers.shape == (grid[0] * 16, grid[1] * 16, 3)
        assert np.abs(picture / 255 - by_diffusers).max() <= 0.5 / 255 + 1e-4
        assert np.abs(picture.astype(int) - by_one).max() <= 1
