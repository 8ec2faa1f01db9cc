"""Norms with the operation behind them: LayerNorm with modulation, RMSNorm with learned weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * scale + shift; `scale` includes the 1. x: [tokens, dim]; shift, scale: [1 or tokens, dim]."""
    if shift.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], scale[0], shift[0], eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; `weight` broadcasts to x."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


class Scale(nn.Module):
    """Learned scale, the weight of an RMSNorm."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
