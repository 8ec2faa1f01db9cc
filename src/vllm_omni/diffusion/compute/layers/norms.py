"""Norms with the operation behind them: LayerNorm with modulation, RMSNorm with learned weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * scale + shift; `scale` includes the 1 of 1 + scale.

    x: [tokens, dim]; shift, scale: [1, dim] for all tokens, or [tokens, dim].
    """
    if shift.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], scale[0], shift[0], eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y; gate: [1, dim] or [tokens, dim]. In float16 the sum is clamped to finite numbers."""
    out = torch.addcmul(x, y, gate)
    return out.clamp_(-65504, 65504) if out.dtype == torch.float16 else out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; `weight` broadcasts to x."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


class Scale(nn.Module):
    """Learned scale, the weight of an RMSNorm."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
