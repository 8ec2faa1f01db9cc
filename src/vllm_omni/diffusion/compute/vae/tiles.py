"""Overlapping tiles of a picture, and their assignment to ranks. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Tiling:
    """Height and width of a tile, and the distances of neighbouring tiles; tiles overlap by the difference.

    Lengths are in latent pixels for a decode, in pixels for an encode.
    """

    height: int
    width: int
    row_stride: int
    column_stride: int

    @classmethod
    def of_samples(cls, vae: Any, scale: int) -> Self:
        """Tiling of a diffusers VAE whose tile sizes are attributes in pixels; scale: pixels of a unit."""
        return cls(
            height=vae.tile_sample_min_height // scale,
            width=vae.tile_sample_min_width // scale,
            row_stride=vae.tile_sample_stride_height // scale,
            column_stride=vae.tile_sample_stride_width // scale,
        )

    def scaled(self, scale: int) -> Tiling:
        """The tiling in units `scale` times as small."""
        return Tiling(self.height * scale, self.width * scale, self.row_stride * scale, self.column_stride * scale)


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture. At the lower and right edges tiles may be smaller than those of the tiling."""

    picture: int
    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


def split_into_tiles(picture: int, height: int, width: int, tiling: Tiling) -> list[Tile]:
    """Tiles of a picture of this size, row by row, as in diffusers; a picture that fits into a tile is one tile."""
    if height <= tiling.height and width <= tiling.width:
        return [Tile(picture, 0, 0, 0, 0, height, width)]
    return cut_into_tiles(picture, height, width, tiling)


def cut_into_tiles(picture: int, height: int, width: int, tiling: Tiling) -> list[Tile]:
    """Tiles of a picture of this size, row by row, however small it is."""
    return [
        Tile(picture, row, column, top, left, min(tiling.height, height - top), min(tiling.width, width - left))
        for row, top in enumerate(range(0, height, tiling.row_stride))
        for column, left in enumerate(range(0, width, tiling.column_stride))
    ]


def assign_tiles(tiles: Sequence[Tile], num_ranks: int) -> list[list[Tile]]:
    """Tiles of each rank, with about equal areas: each tile, the largest first, goes to the rank with the least area.

    With fewer tiles than ranks the last ranks get none; the first rank always has a tile.
    """
    shares: list[list[Tile]] = [[] for _ in range(num_ranks)]
    areas = [0] * num_ranks
    for tile in sorted(tiles, key=lambda tile: -tile.height * tile.width):
        rank = areas.index(min(areas))
        shares[rank].append(tile)
        areas[rank] += tile.height * tile.width
    return shares
