"""Rows of numbers in float8 (e4m3fn, arXiv 2209.05433) with a scale each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEAST_SCALE = torch.finfo(torch.float32).tiny
"""A row of zeros has a scale, too, and it is no subnormal number, which devices may take for zero."""


class Float8Rows(NamedTuple):
    """What `values * scale` is, up to rounding."""

    values: Tensor
    """float8 [rows, n]."""
    scale: Tensor
    """float32 [rows, 1]."""
    dtype: torch.dtype
    """Of what was rounded, and of products with it."""

    @classmethod
    def of(cls, x: Tensor) -> Float8Rows:
        return cls(*quantize(x), x.dtype)


Rows = Tensor | Float8Rows


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n] -> float8 [rows, n] and the scale that each row is multiplied with, float32 [rows, 1].

    The largest magnitude of a row becomes float8's largest. A row with an infinity or a NaN is NaN, others are not.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=LEAST_SCALE)
    return (x / scale).to(FLOAT8), scale
