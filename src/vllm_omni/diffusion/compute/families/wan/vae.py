"""Wan's VAE, diffusers' AutoencoderKLWan: decodes a video piece by piece, and encodes one the same way.

The VAE is causal in time: the first latent frame becomes one video frame, each further one becomes four. They depend on
earlier latent frames by the features that the decoder's convolutions keep of these, and those of the encoder in the
other direction. diffusers keeps the features in the module during one call of `decode` or `encode`. Here they belong to
the request, so decodes and encodes of several videos can take turns. Where one rank works in tiles to save memory,
features of the tiles that wait lie in host memory: all tiles together have more of them than the whole frame.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor

from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.device.transfers import is_host, to_device, to_host
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.families.wan.config import PATCH_SIZE
from vllm_omni.diffusion.compute.step.finite import is_finite, keep_infinite_pixels_visible
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures, Grid, Picture
from vllm_omni.diffusion.compute.step.sampling import tokens_of_frames, unpack_latents
from vllm_omni.diffusion.compute.vae.latent_decoder import to_bytes
from vllm_omni.diffusion.compute.vae.scaling import latents_mean_and_std
from vllm_omni.diffusion.compute.vae.shared_decode import SharedDecoder, blend_tiles, cut_out
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice
from vllm_omni.diffusion.compute.vae.tiles import Tile, Tiling, cut_into_tiles

logger = logging.getLogger(__name__)

ONE_TILE = Tiling(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)
EncoderFeatures = dict[Tile, list[Tensor | None]]
"""Features that the VAE's encoder keeps of the latent frames of a video that it has encoded, for each tile."""


class WanDecoder:
    """Decodes token latents. With `tiled` or several ranks, pixels equal those of diffusers' tiling on one rank.

    Without either, a picture or video that does not fit the memory whole is decoded in tiles.
    """

    def __init__(
        self, vae: AutoencoderKLWan, tiled: bool, group: DecodeGroup, choice: TileChoice | None = None
    ) -> None:
        """group: ranks that share each decode; all of them call with the same latents. choice: of tiles by memory;
        None: tiles only where a decode has run out of memory.
        """
        keep_infinite_pixels_visible(vae.decoder)
        if tiled:
            vae.enable_tiling()
        self._vae = vae
        self._patch_size: int = vae.config.patch_size or 1
        scale: int = vae.spatial_compression_ratio
        self._tiling = Tiling.of_samples(vae, scale)
        self._is_always_tiled = vae.use_tiling or group.size > 1
        self._choice = choice or TileChoice()
        self._in_tiles = SharedDecoder(vae, self._tiling, scale // self._patch_size, group)
        self._as_whole = SharedDecoder(vae, ONE_TILE, scale // self._patch_size, DecodeGroup.alone())
        self._parks_features = group.size == 1
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
            if (video := self.decode_next(tokens, grid, range(grid[0]), {})) is not None:
                made.append(video._replace(pixels=video.pixels[0]) if grid[0] == 1 else video)
        return made

    def decode_next(self, latents: Tensor, grid: Grid, frames: range, features: DecoderFeatures) -> Picture | None:
        """Video frames of the next latent frames of a video, uint8 [frames, height, width, 3]; see `VideoDecoder`.

        A video that runs out of memory begins again in tiles: the latent frames before these are decoded once more.
        """
        if self._is_always_tiled or not self._can_tile(grid):
            return self._decode_frames(latents, grid, frames, features, self._in_tiles)
        if self._fits(grid) if not features else self._is_whole(features):
            try:
                return self._decode_frames(latents, grid, frames, features, self._as_whole)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, because the traceback holds the tensors of the failed attempt.
            features.clear()
            self._choice.release()
            for number in range(frames.start):
                self._decode_frames(latents, grid, range(number, number + 1), features, self._in_tiles)
        made = self._decode_frames(latents, grid, frames, features, self._in_tiles)
        return None if made is None else made._replace(is_tiled=True)

    def _can_tile(self, grid: Grid) -> bool:
        _, rows, columns = grid
        return PATCH_SIZE * rows > self._tiling.height or PATCH_SIZE * columns > self._tiling.width

    def _fits(self, grid: Grid) -> bool:
        """Whether a picture or video of this grid fits the free memory whole."""
        frames, rows, columns = grid
        side = PATCH_SIZE * self._vae.spatial_compression_ratio
        num_frames = 1 + (frames - 1) * self._vae.config.scale_factor_temporal
        return self._choice.most_whole(rows * side, columns * side, num_frames) > 0

    @staticmethod
    def _is_whole(features: DecoderFeatures) -> bool:
        """Whether the decode that these features belong to is whole; a picture of several tiles has several entries."""
        return len(features) == 1

    def _decode_frames(
        self, latents: Tensor, grid: Grid, frames: range, features: DecoderFeatures, decode: SharedDecoder
    ) -> Picture | None:
        """Pixels of some latent frames, the next ones by `features`, of this rank or None."""
        tokens = tokens_of_frames(latents, grid, frames).to(self._vae.dtype).chunk(len(frames))
        scaled = torch.stack([unpack_latents(frame, *grid[1:]) for frame in tokens], dim=1)[None]
        scaled = scaled / self._inverse_std + self._mean
        parks = self._parks_features and decode is self._in_tiles and self._can_tile(grid)
        for pixels in decode([scaled], partial(self._decode_tile, features, parks)):
            if self._patch_size > 1:
                pixels = unpatchify(pixels, self._patch_size)
            return Picture(to_bytes(pixels[0].movedim(0, -1)), is_finite(pixels))
        return None

    def _decode_tile(self, features: DecoderFeatures, parks: bool, latents: Tensor, tile: Tile) -> Tensor:
        """Pixels [1, colours, frames, height, width] of the next latent frames [1, channels, n, height, width].

        parks: whether the tile's features wait for the next latent frames in host memory.
        """
        is_first = tile not in features
        kept = features.setdefault(tile, [None] * self._num_features)
        if parks:
            fetch(kept, latents.device)
        decoded = []
        for latent_frame in latents.split(1, dim=2):
            x = self._vae.post_quant_conv(latent_frame)
            decoded.append(self._vae.decoder(x, feat_cache=kept, feat_idx=[0], first_chunk=is_first))
            is_first = False
        if parks:
            park(kept)
        return torch.cat(decoded, dim=2)


def fetch(features: list[Any], device: torch.device) -> None:
    """Bring features of a tile back to the device; the list changes in place."""
    features[:] = [to_device(x, device) if isinstance(x, Tensor) and is_host(x.device) else x for x in features]


def park(features: list[Any]) -> None:
    """Move features of a tile, until its next latent frame, to host memory; the list changes in place."""
    for index, feature in enumerate(features):
        if isinstance(feature, Tensor):
            features[index] = to_host(feature)


class WanEncoder:
    """Makes latents of input pictures as frames of a video: the mode of the VAE's distribution, normalized.

    They equal those of diffusers' `encode`, also with the VAE's tiling.
    """

    def __init__(self, vae: AutoencoderKLWan, choice: TileChoice | None = None) -> None:
        """choice: of tiles by memory; None: tiles only where an encode has run out of memory."""
        self.vae = vae
        self.choice = choice or TileChoice()
        self._patch_size: int = vae.config.patch_size or 1
        scale = vae.spatial_compression_ratio // self._patch_size
        self._tiling = Tiling.of_samples(vae, 1)
        self._latent_tiling = Tiling.of_samples(vae, scale)
        self._scale = scale
        self.num_features = sum(isinstance(module, WanCausalConv3d) for module in vae.encoder.modules())
        self._mean, std = latents_mean_and_std(vae, torch.float32)
        self._inverse_std = 1.0 / std

    def encode_next(self, frames: Tensor, features: EncoderFeatures, is_tiled: bool) -> Tensor:
        """Latents of the next latent frame of a video, float32 [channels, 1, height / scale, width / scale].

        frames: [1, 3, n, height, width] in [-1, 1], n 1 for the first latent frame and 4 for each further one.
        features: those of this video, which the call updates; empty before the first latent frame. is_tiled: whether
        to encode in the VAE's tiles.
        """
        x = patchify(frames, self._patch_size)
        tiling = self._tiling if is_tiled else ONE_TILE
        tiles = cut_into_tiles(0, x.shape[-2], x.shape[-1], tiling)
        encoded = {tile: self._encode_tile(cut_out(x, tile), tile, features, len(tiles) > 1) for tile in tiles}
        height, width = (side // self._scale for side in x.shape[-2:])
        moments = blend_tiles(self.vae, encoded, self._latent_tiling)[..., :height, :width]
        return self.normalize(moments.chunk(2, dim=1)[0])

    def normalize(self, mode: Tensor) -> Tensor:
        """Latents as the transformer takes them, float32 [channels, ...]. mode: [1, channels, ...] of the VAE."""
        return ((mode.float() - self._mean) * self._inverse_std)[0]

    def chooses_tiles(self, height: int, width: int, num_frames: int) -> bool:
        """Whether to encode a video in tiles: the VAE's tiling is on, or the whole does not fit the memory."""
        if not self._can_tile(height, width):
            return False
        return self.vae.use_tiling or not self.choice.encodes_whole(height, width, num_frames)

    def repeats_in_tiles(self, height: int, width: int) -> bool:
        """Whether a video that ran out of memory whole may begin again in tiles."""
        return self.choice.repeats_encodes and self._can_tile(height, width)

    def _can_tile(self, height: int, width: int) -> bool:
        """Whether frames are larger than a tile. diffusers compares it with frames before they become patches."""
        return height > self._tiling.height or width > self._tiling.width

    def _encode_tile(self, patches: Tensor, tile: Tile, features: EncoderFeatures, parks: bool) -> Tensor:
        kept = features.setdefault(tile, [None] * self.num_features)
        if parks:
            fetch(kept, patches.device)
        moments: Tensor = self.vae.quant_conv(self.vae.encoder(patches, feat_cache=kept, feat_idx=[0]))
        if parks:
            park(kept)
        return moments


class ConditioningVideo:
    """Video that a request is conditioned on, and its encode: the input pictures and, between them, zero (grey) frames.

    Requests with the same pictures share it, and each asks for its own pieces.
    """

    def __init__(self, encoder: WanEncoder, num_frames: int, first: np.ndarray, last: np.ndarray | None = None) -> None:
        """first, last: uint8 [height, width, 3]. num_frames: 1 for the picture alone, at least 2 if `last` is given."""
        self._encoder = encoder
        self._num_frames = num_frames
        self._is_tiled = False
        self._pictures = {0: first} if last is None else {0: first, num_frames - 1: last}
        assert len(self._pictures) <= num_frames
        self.num_latent_frames = 1 + (num_frames - 1) // encoder.vae.config.scale_factor_temporal
        self._features: EncoderFeatures = {}
        self._latents: list[Tensor] = []
        """Latent frames that are encoded."""

    def advance(self, end: int) -> None:
        """Encode the latent frames up to `end` (exclusive) that are not encoded. After an error it begins again.

        One that does not fit the memory whole is encoded in tiles, from its beginning.
        """
        encoder, (height, width, _) = self._encoder, self._pictures[0].shape
        if not self._latents:
            self._is_tiled = encoder.chooses_tiles(height, width, self._num_frames)
        while True:
            try:
                self._encode_up_to(end)
                return
            except Exception as error:  # features may be of a part of the latent frame
                self._features.clear()
                self._latents.clear()
                if self._is_tiled or not is_out_of_memory(error) or not encoder.repeats_in_tiles(height, width):
                    raise
            # Outside of the handler, because the traceback holds the tensors of the failed attempt.
            encoder.choice.release()
            self._is_tiled = True

    def _encode_up_to(self, end: int) -> None:
        encoder = self._encoder
        if self._is_tiled and not self._latents and not encoder.vae.use_tiling:
            height, width, _ = self._pictures[0].shape
            logger.info("input pictures of %dx%d are encoded in tiles: they do not fit the memory whole", width, height)
        for number in range(len(self._latents), end):
            self._latents.append(encoder.encode_next(self._frames_of(number), self._features, self._is_tiled))
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
