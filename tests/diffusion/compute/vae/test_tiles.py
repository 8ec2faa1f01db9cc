"""Split of pictures into tiles, and their assignment to ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.diffusion.compute.vae.tiles import Tile, Tiling, assign_tiles, split_into_tiles

TILING = Tiling(height=8, width=6, row_stride=6, column_stride=4)


def test_a_picture_that_fits_is_one_tile() -> None:
    assert split_into_tiles(3, 8, 6, TILING) == [Tile(3, 0, 0, 0, 0, 8, 6)]
    assert split_into_tiles(0, 1, 1, TILING) == [Tile(0, 0, 0, 0, 0, 1, 1)]


def test_a_picture_with_one_long_side_is_cut_along_both_as_in_diffusers() -> None:
    assert split_into_tiles(0, 8, 7, TILING) == [
        Tile(0, 0, 0, 0, 0, 8, 6),
        Tile(0, 0, 1, 0, 4, 8, 3),
        Tile(0, 1, 0, 6, 0, 2, 6),
        Tile(0, 1, 1, 6, 4, 2, 3),
    ]


sides = st.integers(1, 40)


@settings(deadline=None)
@given(sides, sides)
def test_tiles_cover_the_picture_and_overlap_their_neighbours(height: int, width: int) -> None:
    covered = np.zeros((height, width), int)
    tiles = split_into_tiles(0, height, width, TILING)
    for tile in tiles:
        assert 0 < tile.height <= TILING.height
        assert 0 < tile.width <= TILING.width
        covered[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert sum(tile.height * tile.width for tile in tiles) == covered.sum()
    assert covered.min() == 1
    assert [(tile.row, tile.column) for tile in tiles] == sorted((tile.row, tile.column) for tile in tiles)


@settings(deadline=None)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.integers(1, 9))
def test_every_tile_is_assigned_once_and_ranks_get_similar_areas(
    pictures: list[tuple[int, int]], num_ranks: int
) -> None:
    tiles = [tile for index, size in enumerate(pictures) for tile in split_into_tiles(index, *size, TILING)]
    shares = assign_tiles(tiles, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(tiles, key=repr) == sorted((tile for share in shares for tile in share), key=repr)
    areas = [sum(tile.height * tile.width for tile in share) for share in shares]
    assert max(areas) - min(areas) <= max(tile.height * tile.width for tile in tiles)
    assert shares[0]
    assert assign_tiles(tiles, num_ranks) == shares


def test_large_tiles_are_assigned_first() -> None:
    areas = [4, 4, 8, 16]
    shares = assign_tiles([Tile(i, 0, 0, 0, 0, 4, area // 4) for i, area in enumerate(areas)], 2)
    assert [sorted(tile.picture for tile in share) for share in shares] == [[3], [0, 1, 2]]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_default_picture_of_the_real_model_is_shared_evenly(num_ranks: int) -> None:
    """1024 x 1024 pixels, in tiles of 256 x 256 with a stride of 192."""
    tiles = split_into_tiles(0, 128, 128, Tiling(32, 32, 24, 24))
    assert len(tiles) == 36
    areas = [sum(tile.height * tile.width for tile in share) for share in assign_tiles(tiles, num_ranks)]
    assert max(areas) <= 1.2 * sum(areas) / num_ranks
