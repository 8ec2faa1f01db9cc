"""One VAE decode shared by ranks: each decodes some tiles, the first blends them, as diffusers' `tiled_decode` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.models.tiles import Tile, Tiling, cut, deal

RGB = 3


class SharedDecoder:
    """Decodes tiles of the VAE's own size whatever the number of ranks, so that pixels do not depend on it.

    A picture that fits one tile is decoded whole by one rank. Several pictures are dealt out together.
    """

    def __init__(self, vae: AutoencoderKLQwenImage, group: Group) -> None:
        """vae: with a decoder of single frames."""
        self._vae = vae
        self._group = group
        self._scale: int = 2 ** len(vae.temperal_downsample)
        self._tiling = Tiling(
            height=vae.tile_sample_min_height // self._scale,
            width=vae.tile_sample_min_width // self._scale,
            row_stride=vae.tile_sample_stride_height // self._scale,
            column_stride=vae.tile_sample_stride_width // self._scale,
        )

    def __call__(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """latents: [1, channels, 1, height / scale, width / scale] of each picture, the same on all ranks.

        -> [1, 3, 1, height, width] of each on the group's first rank, nothing on the others.
        """
        pictures = [cut(index, z.shape[-2], z.shape[-1], self._tiling) for index, z in enumerate(latents)]
        shares = deal([tile for tiles in pictures for tile in tiles], self._group.size)
        decoded = self._collect(shares, [self._decode(latents[t.picture], t) for t in shares[self._group.rank]])
        return [self._blend(tiles, decoded) for tiles in pictures] if self._group.rank == 0 else []

    def _decode(self, latents: Tensor, tile: Tile) -> Tensor:
        part = latents[..., tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        pixels: Tensor = self._vae.decoder(self._vae.post_quant_conv(part))
        return pixels

    def _collect(self, shares: Sequence[Sequence[Tile]], mine: Sequence[Tensor]) -> dict[Tile, Tensor]:
        """The pixels of all tiles on the first rank; of its own on another."""
        group = self._group
        decoded = dict(zip(shares[group.rank], mine, strict=True))
        lengths = [0, *(sum(map(self._num_values, share)) for share in shares[1:])]
        if not any(lengths):
            return decoded
        nothing = torch.empty(0, dtype=self._vae.dtype, device=self._vae.device)
        sent = torch.cat([nothing, *(pixels.flatten() for pixels in mine if group.rank > 0)])
        silent = [0] * (group.size - 1)
        received = group.all_to_all(sent, [len(sent), *silent], lengths if group.rank == 0 else [0, *silent])
        if group.rank == 0:
            tiles = [tile for share in shares[1:] for tile in share]
            for tile, pixels in zip(tiles, received.split(list(map(self._num_values, tiles))), strict=True):
                decoded[tile] = pixels.view(1, RGB, 1, tile.height * self._scale, tile.width * self._scale)
        return decoded

    def _num_values(self, tile: Tile) -> int:
        return RGB * tile.height * tile.width * self._scale**2

    def _blend(self, tiles: Sequence[Tile], decoded: Mapping[Tile, Tensor]) -> Tensor:
        """One picture. Each tile fades into the one above, then into the one on its left, over their overlap."""
        if len(tiles) == 1:
            return decoded[tiles[0]]
        vae = self._vae
        down = vae.tile_sample_min_height - vae.tile_sample_stride_height
        right = vae.tile_sample_min_width - vae.tile_sample_stride_width
        rows = [[decoded[tile] for tile in row] for _, row in groupby(tiles, key=lambda tile: tile.row)]
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                if i > 0:
                    vae.blend_v(rows[i - 1][j], tile, down)
                if j > 0:
                    vae.blend_h(row[j - 1], tile, right)
        height, width = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        return torch.cat([torch.cat([tile[..., :height, :width] for tile in row], dim=-1) for row in rows], dim=-2)
