"""Decodes that ranks share against diffusers' tiled decode by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.qwen_image.vae import FrameCoder, QwenImageDecoder, decode_frame, tiling_of
from vllm_omni.diffusion.compute.step.sampling import pack_latents
from vllm_omni.diffusion.compute.vae.shared_decode import SharedDecoder
from vllm_omni.diffusion.data import DiffusionParallelConfig

TILES = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 48,
    "tile_sample_stride_height": 48,
    "tile_sample_stride_width": 40,
}
"""Smaller than the VAE's own, and not square: 8 x 6 latent pixels, which overlap by 2 downwards and 1 to the right."""
GRIDS = [(4, 3), (5, 7), (5, 7), (1, 9), (11, 2)]
"""Rows and columns of tokens (2 x 2 latent pixels each): one tile, odd numbers of tiles, a strip each way."""


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def load(path: Path) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage.from_pretrained(path / "vae").eval().requires_grad_(False)
    vae.enable_tiling(**TILES)
    return vae


def load_for_frames(path: Path) -> AutoencoderKLQwenImage:
    vae = load(path)
    vae.decoder = FrameCoder(vae.decoder)
    return vae


def latents(grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[1, 16, 1, height / 8, width / 8] each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((1, 16, 1, 2 * rows, 2 * columns), generator=generator) for rows, columns in grids]


def decode_tiles(world: World, path: Path, grids: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], dict[str, int]]:
    vae = load_for_frames(path)
    scale, tiling = tiling_of(vae)
    shared = SharedDecoder(vae, tiling, scale, world.mesh.vae)
    pictures = shared(latents(grids), lambda z, tile: decode_frame(vae, z))
    return [pixels.numpy() for pixels in pictures], dict(world.sent)


def shared_by(size: int) -> DiffusionParallelConfig:
    return DiffusionParallelConfig(ulysses_degree=size, vae_patch_parallel_size=size)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_tiles_decoded_by_ranks_are_blended_as_by_one(tiny_model: Path, num_ranks: int) -> None:
    vae = load_for_frames(tiny_model)
    first, *others = run_ranks(decode_tiles, shared_by(num_ranks), tiny_model, GRIDS)
    assert [pictures for pictures, _ in others] == [[]] * (num_ranks - 1)
    for pixels, z in zip(first[0], latents(GRIDS), strict=True):
        wanted = vae.decode(z, return_dict=False)[0]
        assert pixels.shape == wanted.shape
        # A picture of one tile is clamped by diffusers, and by our rounding.
        assert np.abs(pixels.clip(-1, 1) - wanted.clamp(-1, 1).numpy()).max() <= 1e-6
    # Only what other ranks decoded travels, once.
    assert first[1]["all_to_all"] == 0
    assert all(sent["all_to_all"] > 0 for _, sent in others)


def test_more_ranks_than_tiles(tiny_model: Path) -> None:
    vae = load_for_frames(tiny_model)
    grids = [(3, 4)]  # two tiles beside each other
    first, second, *idle = run_ranks(decode_tiles, shared_by(4), tiny_model, grids)
    assert np.abs(first[0][0] - vae.decode(latents(grids)[0], return_dict=False)[0].numpy()).max() <= 1e-6
    assert second[1]["all_to_all"] > 0
    assert [sent["all_to_all"] for _, sent in idle] == [0, 0]


def test_a_picture_of_one_tile_needs_no_exchange(tiny_model: Path) -> None:
    for _, sent in run_ranks(decode_tiles, shared_by(2), tiny_model, [(4, 3)]):
        assert sent == {}


def decode_pictures(world: World, path: Path, one_at_a_time: bool) -> list[np.ndarray]:
    return arrays(QwenImageDecoder(load(path), one_at_a_time, False, world.mesh.vae))


def arrays(decode: QwenImageDecoder) -> list[np.ndarray]:
    return [picture.pixels.numpy() for picture in decode(tokens(), [(1, *grid) for grid in GRIDS])]


def tokens() -> list[Tensor]:
    return [pack_latents(z[0, :, 0]) for z in latents(GRIDS)]


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_pictures_of_ranks_are_those_of_one_and_of_diffusers(tiny_model: Path, one_at_a_time: bool) -> None:
    first, *others = run_ranks(decode_pictures, shared_by(3), tiny_model, one_at_a_time)
    assert others == [[], []]
    alone = arrays(QwenImageDecoder(load(tiny_model), one_at_a_time, True, DecodeGroup.alone()))
    vae = load(tiny_model)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for picture, by_one, z in zip(first, alone, latents(GRIDS), strict=True):
        pixels = vae.decode(z / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        by_diffusers = VaeImageProcessor().postprocess(pixels, output_type="np")[0]
        assert picture.dtype == np.uint8
        assert picture.shape == by_diffusers.shape
        assert np.abs(picture / 255 - by_diffusers).max() <= 0.5 / 255 + 1e-4
        if one_at_a_time:
            assert (picture == by_one).all()
        else:
            # One rank decodes the two of one size as a batch, which rounds differently.
            assert np.abs(picture.astype(int) - by_one).max() <= 1
