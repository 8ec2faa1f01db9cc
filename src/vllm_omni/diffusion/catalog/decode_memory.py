"""Memory of a VAE's decode of a picture, whole or in tiles. No torch here."""

from __future__ import annotations

FLOAT32_BYTES = 4
TILED_PIXEL_BYTES = 36
"""Bytes of each pixel of a picture whose tiles are decoded: all tiles, which overlap, or these blended and rounded."""


def picture_bytes(height: int, width: int, bytes_of_pixel: int, tile_side: int | None) -> int:
    """Peak bytes of the decode of a picture; height, width: in pixels.

    bytes_of_pixel: bytes for each pixel that is decoded at once; tile_side: side of a tile in pixels, None: whole.
    """
    if tile_side is None or max(height, width) <= tile_side:
        return height * width * bytes_of_pixel
    tile = min(height, tile_side) * min(width, tile_side)
    return tile * bytes_of_pixel + height * width * TILED_PIXEL_BYTES
