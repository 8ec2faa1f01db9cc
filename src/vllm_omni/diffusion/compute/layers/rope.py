"""Rotary position embedding: neighbouring pairs of channels are rotated as complex numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_rotations(
    positions: Tensor, axes_dim: Sequence[int], theta: float = 10000.0, precision: torch.dtype = torch.float32
) -> Tensor:
    """Cosine and sine of the angle that rotates each pair of channels.

    positions: integers [tokens, axes]; axes_dim: channels that each axis rotates, even numbers; precision: dtype of the
    angles. Returns float32 [tokens, sum(axes_dim) / 2, 2].
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=precision).div(dim))
        angles.append(torch.outer(positions[:, axis].to(precision), frequencies).float())
    angle = torch.cat(angles, dim=1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate pairs of channels. x: [tokens, ..., d]; rotations: float32 [tokens, ..., d / 2, 2], broadcast."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real operations and does not compile complex ones
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
        rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:  # one pass over the memory
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return rotated.flatten(-2).to(x.dtype)
