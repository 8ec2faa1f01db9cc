"""Qwen-Image's VAE for single pictures: diffusers' video VAE, reduced to one frame."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.step.finite import keep_infinite_pixels_visible
from vllm_omni.diffusion.compute.step.pipeline import Grid, Picture
from vllm_omni.diffusion.compute.step.sampling import pack_latents, unpack_latents
from vllm_omni.diffusion.compute.vae.latent_decoder import LatentDecoder
from vllm_omni.diffusion.compute.vae.scaling import latents_mean_and_std
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice, tiling_on
from vllm_omni.diffusion.compute.vae.tiles import Tiling

logger = logging.getLogger(__name__)


class FrameConv(nn.Module):
    """Causal 3D convolution of one frame: the frames before it are zero, so only the last time slice has an effect."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        left, _, top, *_ = conv._padding
        self.padding = (top, left)
        self.weight = nn.Parameter(conv.weight[:, :, -1].contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """x: [pictures, channels, 1, height, width]."""
        assert x.shape[2] == 1
        assert cache_x is None
        return F.conv2d(x[:, :, 0], self.weight, self.bias, padding=self.padding)[:, :, None]


class FrameCoder(nn.Module):
    """Encoder or decoder of the VAE for one frame; it keeps no features for a next frame."""

    def __init__(self, coder: nn.Module) -> None:
        super().__init__()
        self.coder = coder
        for parent in list(coder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, QwenImageCausalConv3d):
                    setattr(parent, name, FrameConv(child))

    def forward(self, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
        out: Tensor = self.coder(x)
        return out


class QwenImageEncoder:
    """Makes token latents of pictures: the mode of the VAE's distribution, normalized for the transformer."""

    def __init__(self, vae: AutoencoderKLQwenImage, choice: TileChoice | None = None) -> None:
        """choice: of tiles by memory; None: tiles only where an encode has run out of memory."""
        self._choice = choice or TileChoice()
        vae.encoder = FrameCoder(vae.encoder)
        self._vae = vae
        self._mean, self._std = latents_mean_and_std(vae, vae.dtype)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Latents [rows * columns, channels * 4]. pixels: uint8 [height, width, 3]; a token's side divides both."""
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
        mode = self._encode(to_device(values.to(self._vae.dtype), self._vae.device))
        return pack_latents(((mode - self._mean) / self._std)[0, :, 0])

    def _encode(self, pixels: Tensor) -> Tensor:
        """Mode [1, channels, 1, height / 8, width / 8] of a picture [1, 3, 1, height, width], in tiles if need be."""
        vae, (height, width) = self._vae, pixels.shape[-2:]
        can_tile = not vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width)
        if not can_tile or self._choice.encodes_whole(height, width):
            try:
                return self._mode(pixels)
            except Exception as error:
                if not (can_tile and self._choice.repeats_encodes and is_out_of_memory(error)):
                    raise
            self._choice.release()
        logger.info("an input picture of %dx%d is encoded in tiles: it does not fit the memory whole", width, height)
        with tiling_on(vae):
            return self._mode(pixels)

    def _mode(self, pixels: Tensor) -> Tensor:
        mode: Tensor = self._vae.encode(pixels).latent_dist.mode()
        return mode


class QwenImageDecoder:
    """Decodes token latents with a Qwen-Image VAE; see `LatentDecoder` for the rest."""

    def __init__(
        self,
        vae: AutoencoderKLQwenImage,
        one_at_a_time: bool,
        tiled: bool,
        group: DecodeGroup,
        choice: TileChoice | None = None,
    ) -> None:
        vae.decoder = FrameCoder(vae.decoder)
        keep_infinite_pixels_visible(vae.decoder)
        if tiled:
            vae.enable_tiling()
        self._dtype: torch.dtype = vae.dtype
        scale, tiling = tiling_of(vae)
        self._decode = LatentDecoder(
            vae, partial(decode_frame, vae), tiling, scale, one_at_a_time, group, choice=choice
        )
        self._mean, std = latents_mean_and_std(vae, vae.dtype)
        self._inverse_std = 1.0 / std

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
        """Pictures, uint8 [height, width, 3]. latents: [rows * columns, channels * 4]; grids: (1, rows, columns).

        All ranks of the group must call with the same latents; the first gets the pictures, the others get [].
        """
        unpacked = [
            unpack_latents(tokens, *grid[1:])[None, :, None] for tokens, grid in zip(latents, grids, strict=True)
        ]
        return self._decode([x.to(self._dtype) / self._inverse_std + self._mean for x in unpacked])


def decode_frame(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Pixels [1, 3, 1, height * 8, width * 8] of a tile or a whole picture, [1, channels, 1, height, width]."""
    pixels: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return pixels


def tiling_of(vae: AutoencoderKLQwenImage) -> tuple[int, Tiling]:
    """Side of a latent pixel in pixels, and the VAE's own tiling."""
    scale = 2 ** len(vae.temperal_downsample)
    return scale, Tiling.of_samples(vae, scale)
