"""Decoder of Z-Image's VAE, that of FLUX: diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.layers.kernels import Kernels
from vllm_omni.diffusion.compute.step.pipeline import Grid, Picture
from vllm_omni.diffusion.compute.step.sampling import unpack_latents
from vllm_omni.diffusion.compute.vae.channels_last import put_channels_last
from vllm_omni.diffusion.compute.vae.latent_decoder import LatentDecoder
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice
from vllm_omni.diffusion.compute.vae.tiles import Tiling


class ZImageDecoder:
    """Decodes token latents; see `LatentDecoder` for the rest."""

    def __init__(
        self,
        vae: AutoencoderKL,
        one_at_a_time: bool,
        tiled: bool,
        group: DecodeGroup,
        kernels: Kernels | None = None,
        choice: TileChoice | None = None,
    ) -> None:
        """kernels: implementation of the norms, which also chooses the memory format; None: plain PyTorch."""
        vae.encoder = nn.Identity()  # frees its weights
        if kernels is not None and kernels.normalizes_channels_last:
            put_channels_last(vae.decoder, kernels)
        if tiled:
            vae.enable_tiling()
        self._dtype: torch.dtype = vae.dtype
        self._scaling: float = vae.config.scaling_factor
        self._shift: float = vae.config.shift_factor
        scale, tiling = tiling_of(vae)
        self._decode = LatentDecoder(vae, partial(decode_tile, vae), tiling, scale, one_at_a_time, group, choice=choice)

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
        """Pictures, uint8 [height, width, 3]. latents: [rows * columns, channels * 4]; grids: (1, rows, columns).

        All ranks of the group must call with the same latents; the first gets the pictures, the others get [].
        """
        unpacked = [
            unpack_latents(tokens, *grid[1:], channels_last=True)[None]
            for tokens, grid in zip(latents, grids, strict=True)
        ]
        return self._decode([x.to(self._dtype) / self._scaling + self._shift for x in unpacked])


def decode_tile(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels [1, 3, height * 8, width * 8] of a tile or a whole picture, [1, channels, height, width]."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    pixels: Tensor = vae.decoder(latents)
    return pixels


def tiling_of(vae: AutoencoderKL) -> tuple[int, Tiling]:
    """Side of a latent pixel in pixels, and the VAE's own tiling."""
    side: int = vae.tile_latent_min_size
    stride = int(side * (1 - vae.tile_overlap_factor))
    return 2 ** (len(vae.config.block_out_channels) - 1), Tiling(side, side, stride, stride)
