"""Sizes of pictures that a server accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidRequestError


@dataclass(frozen=True)
class SizeLimits:
    """Limits of the sizes that requests may ask for, in pixels."""

    multiple: int
    """Both sides are multiples of this."""
    max_pixels: int
    max_side: int

    @classmethod
    def of(cls, config: OmniDiffusionConfig, info: ModelInfo) -> SizeLimits:
        """Limits of a server; the default is that of `ModelInfo.default_max_pixels`."""
        max_pixels = info.default_max_pixels if config.max_pixels is None else config.max_pixels
        return cls(info.size_multiple, max_pixels, max_pixels if info.max_side is None else info.max_side)

    def check(self, height: int, width: int) -> None:
        """Raise InvalidRequestError for a size that is not accepted; it names the nearest one, `param` is a side."""
        multiple, most = self.multiple, self.max_pixels
        longer, shorter = ("height", "width") if height > width else ("width", "height")
        if min(height, width) < multiple:
            param, reason = shorter, f": sides must be at least {multiple} pixels"
        elif height * width > most:
            param, reason = longer, f" has {height * width} pixels, at most {most} are accepted (--max-pixels)"
        elif max(height, width) > self.max_side:
            param, reason = longer, f": sides may have up to {self.max_side} pixels with this model"
        elif height % multiple or width % multiple:
            param, reason = "height" if height % multiple else "width", f": sides must be multiples of {multiple}"
        else:
            return
        advice = ""
        if most >= multiple**2:
            nearest_height, nearest_width = self.nearest(height, width)
            advice = f"; the nearest valid size is {nearest_width}x{nearest_height}"
        raise InvalidRequestError(f"size {width}x{height}{reason}{advice}", param=param)

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """Accepted (height, width) nearest to the given one. `max_pixels` must be at least `multiple` squared."""
        multiple = self.multiple
        # Rounded to multiples in integers, because a client's numbers may be too large for a float.
        most = self.max_pixels // multiple**2
        longest = min(self.max_side // multiple, most)
        rows, columns = (min(max((2 * side + multiple) // (2 * multiple), 1), longest) for side in (height, width))
        if rows * columns > most:
            shrink = math.sqrt(most / (rows * columns))
            if rows < columns:
                rows = max(1, int(rows * shrink))
                columns = min(columns, most // rows)
            else:
                columns = max(1, int(columns * shrink))
                rows = min(rows, most // columns)
        return rows * multiple, columns * multiple

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Limit a (height, width) that follows from input pictures: the largest size of its proportions.

        Raises InvalidRequestError, whose `param` is `image`, when a side would be shorter than one multiple.
        """
        shorter, longer = sorted((height, width))
        if height * width <= self.max_pixels and longer <= self.max_side:
            return height, width
        by_pixels, by_side = math.isqrt(self.max_pixels * shorter // longer), self.max_side * shorter // longer
        short = min(by_pixels, by_side) // self.multiple
        if short == 0:
            raise InvalidRequestError(
                f"image: a size of its proportions, as {width}x{height} has them, within {self.max_pixels} pixels "
                f"(--max-pixels) and {self.max_side} a side has a side of less than {self.multiple}; ask for a size",
                param="image",
            )
        # The longer side is computed from the rounded shorter one.
        room = min(self.max_pixels // self.multiple**2 // short, self.max_side // self.multiple)
        long = min(round(short * longer / shorter), room)
        rows, columns = (short, long) if height <= width else (long, short)
        return rows * self.multiple, columns * self.multiple

    def fit_side(self, asked: int, side: int) -> int:
        """Limit a side that follows from input pictures; the other side was asked for and stays."""
        room = min(self.max_pixels // max(asked, 1), self.max_side) // self.multiple * self.multiple
        return min(side, max(room, self.multiple))
