"""Wan's VAE, diffusers' AutoencoderKLWan: decodes a video piece by piece, and encodes one the same way.

The VAE is causal in time: the first latent frame becomes one video frame, each further one becomes four. They depend on
earlier latent frames by the features that the decoder's convolutions keep of these, and those of the encoder in the
other direction. diffusers keeps the features in the module during one call of `decode` or `encode`. Here they belong to
the request, so decodes and encodes of several videos can take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.step.finite import is_finite, keep_infinite_pixels_visible
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures, Grid, Picture
from vllm_omni.diffusion.compute.step.sampling import unpack_latents
from vllm_omni.diffusion.compute.vae.latent_decoder import to_bytes
from vllm_omni.diffusion.compute.vae.scaling import latents_mean_and_std
from vllm_omni.diffusion.compute.vae.shared_decode import SharedDecoder, blend_tiles, cut_out
from vllm_omni.diffusion.compute.vae.tiles import Tile, Tiling, cut_into_tiles

ONE_TILE = Tiling(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)
EncoderFeatures = dict[Tile, list[Tensor | None]]
"""Features that the VAE's encoder keeps of the latent frames of a video that it has encoded, for each tile."""


class WanDecoder:
    """Decodes token latents. With `tiled` or several ranks, pixels equal those of diffusers' tiling on one rank."""

    def __init__(self, vae: AutoencoderKLWan, tiled: bool, group: DecodeGroup) -> None:
        """group: ranks that share each decode; all of them call with the same latents."""
        keep_infinite_pixels_visible(vae.decoder)
        if tiled:
            vae.enable_tiling()
        self._vae = vae
        self._patch_size: int = vae.config.patch_size or 1
        scale: int = vae.spatial_compression_ratio
        tiling = Tiling.of_samples(vae, scale) if vae.use_tiling or group.size > 1 else ONE_TILE
        self._shared = SharedDecoder(vae, tiling, scale // self._patch_size, group)
        self._num_features = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._mean, std = latents_mean_and_std(vae, vae.dtype)
        self._inverse_std = 1.0 / std

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
        """Whole pictures, uint8 [height, width, 3], and whole videos, uint8 [frames, height, width, 3].

        latents: [frames * rows * columns, channels * 4]; grids: (latent frames, rows, columns), pictures have 1 frame.
        The first rank of the group gets the pictures, the others get [].
        """
        made = []
        for tokens, grid in zip(latents, grids, strict=True):
            if (video := self.decode_next(tokens, grid, {})) is not None:
                made.append(video._replace(pixels=video.pixels[0]) if grid[0] == 1 else video)
        return made

    def decode_next(self, latents: Tensor, grid: Grid, features: DecoderFeatures) -> Picture | None:
        """Video frames of the next latent frames of a video, uint8 [frames, height, width, 3].

        latents, grid: of these latent frames alone. features: those of this video on this rank, which the call updates;
        empty before the first latent frame. The first rank of the group gets the frames, the others get None.
        """
        frames = latents.to(self._vae.dtype).chunk(grid[0])
        scaled = torch.stack([unpack_latents(tokens, *grid[1:]) for tokens in frames], dim=1)[None]
        scaled = scaled / self._inverse_std + self._mean
        for pixels in self._shared([scaled], partial(self._decode_tile, features)):
            if self._patch_size > 1:
                pixels = unpatchify(pixels, self._patch_size)
            return Picture(to_bytes(pixels[0].movedim(0, -1)), is_finite(pixels))
        return None

    def _decode_tile(self, features: DecoderFeatures, latents: Tensor, tile: Tile) -> Tensor:
        """Pixels [1, colours, frames, height, width] of the next latent frames [1, channels, n, height, width]."""
        is_first = tile not in features
        kept = features.setdefault(tile, [None] * self._num_features)
        decoded = []
        for latent_frame in latents.split(1, dim=2):
            x = self._vae.post_quant_conv(latent_frame)
            decoded.append(self._vae.decoder(x, feat_cache=kept, feat_idx=[0], first_chunk=is_first))
            is_first = False
        return torch.cat(decoded, dim=2)


class WanEncoder:
    """Makes latents of input pictures as frames of a video: the mode of the VAE's distribution, normalized.

    They equal those of diffusers' `encode`, also with the VAE's tiling.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self._patch_size: int = vae.config.patch_size or 1
        scale = vae.spatial_compression_ratio // self._patch_size
        self._tiling = Tiling.of_samples(vae, 1)
        self._latent_tiling = Tiling.of_samples(vae, scale)
        self._scale = scale
        self.num_features = sum(isinstance(module, WanCausalConv3d) for module in vae.encoder.modules())
        self._mean, std = latents_mean_and_std(vae, torch.float32)
        self._inverse_std = 1.0 / std

    def encode_next(self, frames: Tensor, features: EncoderFeatures) -> Tensor:
        """Latents of the next latent frame of a video, float32 [channels, 1, height / scale, width / scale].

        frames: [1, 3, n, height, width] in [-1, 1], n 1 for the first latent frame and 4 for each further one.
        features: those of this video, which the call updates; empty before the first latent frame.
        """
        x = patchify(frames, self._patch_size)
        tiles = self._tiles(frames, x)
        encoded = {tile: self._encode_tile(cut_out(x, tile), tile, features) for tile in tiles}
        height, width = (side // self._scale for side in x.shape[-2:])
        moments = blend_tiles(self.vae, encoded, self._latent_tiling)[..., :height, :width]
        return self.normalize(moments.chunk(2, dim=1)[0])

    def normalize(self, mode: Tensor) -> Tensor:
        """Latents as the transformer takes them, float32 [channels, ...]. mode: [1, channels, ...] of the VAE."""
        return ((mode.float() - self._mean) * self._inverse_std)[0]

    def _tiles(self, frames: Tensor, patches: Tensor) -> list[Tile]:
        """Tiles of `patches`; diffusers compares the tile's size with that of `frames`, before they become patches."""
        tiling = self._tiling
        is_tiled = self.vae.use_tiling and (frames.shape[-2] > tiling.height or frames.shape[-1] > tiling.width)
        return cut_into_tiles(0, patches.shape[-2], patches.shape[-1], tiling if is_tiled else ONE_TILE)

    def _encode_tile(self, patches: Tensor, tile: Tile, features: EncoderFeatures) -> Tensor:
        kept = features.setdefault(tile, [None] * self.num_features)
        moments: Tensor = self.vae.quant_conv(self.vae.encoder(patches, feat_cache=kept, feat_idx=[0]))
        return moments


class ConditioningVideo:
    """Video that a request is conditioned on, and its encode: the input pictures and, between them, zero (grey) frames.

    Requests with the same pictures share it, and each asks for its own pieces.
    """

    def __init__(self, encoder: WanEncoder, num_frames: int, first: np.ndarray, last: np.ndarray | None = None) -> None:
        """first, last: uint8 [height, width, 3]. num_frames: 1 for the picture alone, at least 2 if `last` is given."""
        self._encoder = encoder
        self._pictures = {0: first} if last is None else {0: first, num_frames - 1: last}
        assert len(self._pictures) <= num_frames
        self.num_latent_frames = 1 + (num_frames - 1) // encoder.vae.config.scale_factor_temporal
        self._features: EncoderFeatures = {}
        self._latents: list[Tensor] = []
        """Latent frames that are encoded."""

    def advance(self, end: int) -> None:
        """Encode the latent frames up to `end` (exclusive) that are not encoded. After an error it begins again."""
        try:
            for number in range(len(self._latents), end):
                self._latents.append(self._encoder.encode_next(self._frames_of(number), self._features))
        except Exception:  # features may be of a part of the latent frame
            self._features.clear()
            self._latents.clear()
            raise
        if len(self._latents) == self.num_latent_frames:
            self._features.clear()  # gigabytes for a large video

    def finish(self) -> Tensor:
        """Latents of the whole video: float32 [channels, latent frames, height / scale, width / scale]."""
        self.advance(self.num_latent_frames)
        return torch.cat(self._latents, dim=1)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features that it keeps: 0 unless a part of the video is encoded, and the rest is not."""
        kept = (features for of_tile in self._features.values() for features in of_tile)
        return sum(features.nbytes for features in kept if features is not None)

    def _frames_of(self, number: int) -> Tensor:
        """Frames [1, 3, n, height, width] of a latent frame."""
        vae = self._encoder.vae
        multiple: int = vae.config.scale_factor_temporal
        first, count = (1 + (number - 1) * multiple, multiple) if number else (0, 1)
        height, width, _ = self._pictures[0].shape
        frames = torch.zeros((1, 3, count, height, width), dtype=vae.dtype, device=vae.device)
        for index, pixels in self._pictures.items():
            if first <= index < first + count:
                values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1
                frames[0, :, index - first] = to_device(values.to(vae.dtype), vae.device)
        return frames
