"""A VAE decode shared by ranks: each decodes some tiles, and the first blends them like diffusers' `tiled_decode`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.vae.tiles import Tile, Tiling, assign_tiles, split_into_tiles

DecodeTile = Callable[[Tensor, Tile], Tensor]
"""Converts the latents of a tile to pixels, [1, colours, (frames,) tile height * scale, tile width * scale]."""


class TiledVae(Protocol):
    """Common interface of diffusers' VAEs that decode tiles."""

    dtype: torch.dtype
    device: torch.device

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Blend the top of `b`, in place, with the bottom of `a`."""
        ...

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Blend the left side of `b`, in place, with the right side of `a`."""
        ...


class SharedDecoder:
    """Decoder of tiles of the VAE's own tile size, so that pixels do not depend on the number of ranks.

    A picture that fits into one tile is decoded by one rank. The tiles of several pictures are shared together.
    """

    def __init__(self, vae: TiledVae, tiling: Tiling, scale: int, group: DecodeGroup) -> None:
        """scale: side of a latent pixel, in pixels of a decoded tile."""
        self._vae = vae
        self._tiling = tiling
        self._scale = scale
        self._group = group

    def __call__(self, latents: Sequence[Tensor], decode: DecodeTile) -> list[Tensor]:
        """Decode [1, channels, ..., height / scale, width / scale] of each picture, the same on all ranks.

        Returns [1, colours, ..., height, width] of each picture on the group's first rank, [] on the others. Tiles of
        all pictures have the same number of colours and of frames.
        """
        pictures = [split_into_tiles(index, z.shape[-2], z.shape[-1], self._tiling) for index, z in enumerate(latents)]
        shares = assign_tiles([tile for tiles in pictures for tile in tiles], self._group.size)
        mine = [decode(cut_out(latents[tile.picture], tile), tile) for tile in shares[self._group.rank]]
        decoded = self._collect(shares, mine)
        if self._group.rank > 0:
            return []
        tiling = self._tiling.scaled(self._scale)
        return [blend_tiles(self._vae, {tile: decoded[tile] for tile in tiles}, tiling) for tiles in pictures]

    def _collect(self, shares: Sequence[Sequence[Tile]], mine: Sequence[Tensor]) -> dict[Tile, Tensor]:
        """Pixels of all tiles on the first rank; on the others, of their own tiles."""
        group = self._group
        decoded = dict(zip(shares[group.rank], mine, strict=True))
        if not any(shares[1:]):
            return decoded
        nothing = torch.empty(0, dtype=self._vae.dtype, device=self._vae.device)
        silent = [0] * (group.size - 1)
        if group.rank > 0:
            sent = torch.cat([nothing, *(pixels.flatten() for pixels in mine)])
            group.tell(failed=False)
            group.all_to_all(sent, [len(sent), *silent], [0, *silent])
            return decoded
        head = mine[0].shape[:-2]  # the first rank always has a tile
        shapes = {
            tile: (*head, tile.height * self._scale, tile.width * self._scale) for share in shares[1:] for tile in share
        }
        lengths = [sum(math.prod(shapes[tile]) for tile in share) for share in shares[1:]]
        received = nothing.new_empty(sum(lengths))  # before the exchange, which must not fail on one rank alone
        group.tell(failed=False)
        group.all_to_all(nothing, [0, *silent], [0, *lengths], received)
        parts = received.split([math.prod(shape) for shape in shapes.values()])
        return decoded | {tile: part.view(shape) for (tile, shape), part in zip(shapes.items(), parts, strict=True)}


def blend_tiles(vae: TiledVae, tiles: Mapping[Tile, Tensor], tiling: Tiling) -> Tensor:
    """One picture: each tile is blended with the tile above, then with the tile on its left, where they overlap.

    tiles: in order, row by row; they may change in place. tiling: in units of their tensors.
    """
    if len(tiles) == 1:
        return next(iter(tiles.values()))
    down, right = tiling.height - tiling.row_stride, tiling.width - tiling.column_stride
    rows = [[tiles[tile] for tile in row] for _, row in groupby(tiles, key=lambda tile: tile.row)]
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                vae.blend_v(rows[i - 1][j], tile, down)
            if j > 0:
                vae.blend_h(row[j - 1], tile, right)
    height, width = tiling.row_stride, tiling.column_stride
    return torch.cat([torch.cat([tile[..., :height, :width] for tile in row], dim=-1) for row in rows], dim=-2)


def cut_out(x: Tensor, tile: Tile) -> Tensor:
    """Part of `x` [..., height, width] that the tile covers."""
    return x[..., tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
