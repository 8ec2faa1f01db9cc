"""Pictures as overlapping tiles that ranks decode apart: the arithmetic, in latent pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """Sides of a tile, and how far the next one below or to the right begins; what lies between overlaps."""

    height: int
    width: int
    row_stride: int
    column_stride: int


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture; those at the lower and right edge may be smaller than the tiling says."""

    picture: int
    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


def cut(picture: int, height: int, width: int, tiling: Tiling) -> list[Tile]:
    """The tiles of a picture of this size, row by row, as diffusers cuts it: one where it fits a tile."""
    if height <= tiling.height and width <= tiling.width:
        return [Tile(picture, 0, 0, 0, 0, height, width)]
    return [
        Tile(picture, row, column, top, left, min(tiling.height, height - top), min(tiling.width, width - left))
        for row, top in enumerate(range(0, height, tiling.row_stride))
        for column, left in enumerate(range(0, width, tiling.column_stride))
    ]


def deal(tiles: Sequence[Tile], num_ranks: int) -> list[list[Tile]]:
    """The tiles of each rank, of about the same area: the largest first, each to whoever has least.

    Ranks that find nothing left get none; the first rank always has one.
    """
    shares: list[list[Tile]] = [[] for _ in range(num_ranks)]
    areas = [0] * num_ranks
    for tile in sorted(tiles, key=lambda tile: -tile.height * tile.width):
        rank = areas.index(min(areas))
        shares[rank].append(tile)
        areas[rank] += tile.height * tile.width
    return shares
