"""Rounding of rows to float8 (e4m3fn, arXiv 2209.05433), with one scale for each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
"""Largest float8 number."""
LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Scale of a row of zeros: the least normal number, because devices may flush subnormal numbers to zero."""


class Float8Rows(NamedTuple):
    """Rows rounded to float8; `values * scale` are the rows up to rounding."""

    values: Tensor
    """Rounded rows: float8 [rows, n]."""
    scale: Tensor
    """Scale of each row: float32 [rows, 1]."""
    dtype: torch.dtype
    """dtype of the rows before rounding, and of products with them."""

    @classmethod
    def of(cls, x: Tensor) -> Float8Rows:
        """Round the rows of x, [rows, n]."""
        return cls(*quantize(x), x.dtype)

    @classmethod
    def unscaled(cls, values: Tensor) -> Float8Rows:
        """Rows that are float8 [rows, n] already, as they are: with a scale of 1."""
        return cls(values, torch.ones(len(values), 1, device=values.device), torch.float32)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def expanded(self) -> Tensor:
        """Rows in float32."""
        return self.values.float() * self.scale


Rows = Tensor | Float8Rows


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round [rows, n] to float8 [rows, n] with scales float32 [rows, 1].

    The largest magnitude of a row becomes the largest float8 number. Only a row with an infinity or a NaN becomes NaN.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=LEAST_SCALE)
    return (x / scale).to(FLOAT8), scale
