"""Rotary position embedding: neighbouring pairs of channels, as complex numbers, are turned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_rotations(
    positions: Tensor, axes_dim: Sequence[int], theta: float = 10000.0, precision: torch.dtype = torch.float32
) -> Tensor:
    """The cosine and sine by which each pair of channels is turned.

    positions: [tokens, axes], integers; axes_dim: channels that each axis turns, all even; precision: in which angles
    are computed. Returns float32 [tokens, sum(axes_dim) / 2, 2].
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=precision).div(dim))
        angles.append(torch.outer(positions[:, axis].to(precision), frequencies).float())
    angle = torch.cat(angles, dim=1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """x: [tokens, ..., head_dim]; rotations: float32 [tokens, ..., head_dim / 2, 2], broadcast over the middle."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real numbers, but has no complex ones
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:  # a single pass over the memory
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return turned.flatten(-2).to(x.dtype)
