"""cuDNN's fused attention, called through PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import can_use_cudnn_attention

from vllm_omni.diffusion.compute.attention.base import Setting
from vllm_omni.diffusion.compute.attention.dense import Batch, DenseAttention
from vllm_omni.diffusion.compute.attention.limits import why_no_flash
from vllm_omni.diffusion.compute.attention.sdpa import SdpaAttention, sdpa_params

MAX_HEAD_DIM = 128
"""Channels of the widest head that cuDNN takes."""


class CudnnAttention(DenseAttention):
    """Attention by cuDNN, which makes a slow plan once for each shape.

    Some versions refuse some shapes, such as sequences of one token; the `sdpa` backend computes those.
    """

    def __init__(self) -> None:
        self._others = SdpaAttention()

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        if reason := why_no_flash(setting, MAX_HEAD_DIM):
            return reason
        shape = (1, 1, 64, setting.head_dim)
        q, k, v = torch.empty((3, *shape), dtype=setting.dtype, device=setting.device).unbind()
        return None if can_use_cudnn_attention(sdpa_params((q, k, v))) else "PyTorch says that its cuDNN cannot"

    def attend_batch(self, batch: Batch) -> Tensor:
        if not can_use_cudnn_attention(sdpa_params(batch)):
            return self._others.attend_batch(batch)
        out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*batch, None, False)[0]
        return out

    def attend_batch_with_lse(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not can_use_cudnn_attention(sdpa_params(batch)):
            return self._others.attend_batch_with_lse(batch)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*batch, None, True)
        return out, lse.reshape(out.shape[:3])  # from [batch, heads, length, 1]
