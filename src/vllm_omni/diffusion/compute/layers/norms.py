"""Norms with the operation behind them: LayerNorm with modulation, RMSNorm with learned weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import Group


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * scale + shift; `scale` includes the 1 of 1 + scale.

    x: [tokens, dim]; shift, scale: [1, dim] for all tokens, or [tokens, dim]. Computed in the dtype of `scale`, which
    may be wider than that of x and of the result.
    """
    wide = x.to(scale.dtype)
    if shift.shape[0] == 1:
        return F.layer_norm(wide, x.shape[-1:], scale[0], shift[0], eps).to(x.dtype)
    return torch.addcmul(shift, F.layer_norm(wide, x.shape[-1:], eps=eps), scale).to(x.dtype)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y; gate: [1, dim] or [tokens, dim], of the dtype of x or a wider one, in which the sum is computed.

    The result has the dtype of x; in float16 it is clamped to finite numbers.
    """
    out = torch.addcmul(x, y, gate)
    return out.clamp_(-65504, 65504).to(x.dtype) if x.dtype == torch.float16 else out.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; `weight` broadcasts to x."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


def shared_squares(x: Tensor, group: Group) -> Tensor | None:
    """Mean square over the last dim, which the ranks of `group` share: [..., dim / size] -> float32 [...].

    None for a group of one, where a norm finds it by itself.
    """
    if group.size == 1:
        return None
    squares = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
    return group.all_reduce(squares / (x.shape[-1] * group.size))


def wide_rms_norm(x: Tensor, weight: Tensor, eps: float, squares: Tensor | None) -> Tensor:
    """RMSNorm over the last dimension, whose mean square over all ranks is `squares`; None: this rank has all of x."""
    if squares is None:
        return rms_norm(x, weight, eps)
    return (x.float() * torch.rsqrt(squares + eps)[..., None]).to(x.dtype) * weight


class Scale(nn.Module):
    """Learned scale, the weight of an RMSNorm."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class ColumnScale(Scale):
    """Learned scale of features that the ranks of a group share; each rank has its share. weight: [features / size]."""

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(self, features: int, group: Group) -> None:
        """Scale of `features` features over all ranks, whose number divides them."""
        super().__init__(features // group.size)
        self.group = group


class AffineNorm(nn.Module):
    """Weight and bias [dim] of a LayerNorm, in float32 at least, whatever the model's dtype."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
