"""Rotary position embedding, as complex rotation of neighbouring pairs of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_rotations(
    positions: Tensor, axes_dim: Sequence[int], theta: float = 10000.0, precision: torch.dtype = torch.float32
) -> Tensor:
    """Unit complex numbers, one for each pair of channels.

    positions: [tokens, axes], integers; axes_dim: channels that each axis turns, all even; precision: in which angles
    are computed. Returns complex64 [tokens, sum(axes_dim) / 2].
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=precision).div(dim))
        angles.append(torch.outer(positions[:, axis].to(precision), frequencies).float())
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """x: [tokens, ..., head_dim]; rotations: complex64 [tokens, ..., head_dim / 2], broadcast over the middle."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)
