"""PyTorch's scaled_dot_product_attention: runs everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from vllm_omni.diffusion.compute.attention.base import Setting
from vllm_omni.diffusion.compute.attention.dense import Batch, DenseAttention

HEAD_DIM_MULTIPLE = 8
"""Of what the flash and the efficient kernel take; `scaled_dot_product_attention` fills up, its kernels do not."""


class SdpaAttention(DenseAttention):
    """PyTorch's own choice among its kernels. With the log-sum-exp, which its public function does not return, the
    flash kernel where it takes the tensors, or else the memory-efficient one (float32 too)."""

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        return None

    def attend_batch(self, batch: Batch) -> Tensor:
        return F.scaled_dot_product_attention(*batch)

    def attend_batch_with_lse(self, batch: Batch) -> tuple[Tensor, Tensor]:
        q, k, v = batch
        if q.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            return out, lse
        if q.is_cuda and q.shape[-1] % HEAD_DIM_MULTIPLE == 0:
            params = sdpa_params(batch)
            if can_use_flash_attention(params):
                out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
                return out, lse
            if can_use_efficient_attention(params):
                out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
                return out, lse[..., : q.shape[2]]  # filled up to a multiple of 32
        return attend_by_definition(batch)


def attend_by_definition(batch: Batch) -> tuple[Tensor, Tensor]:
    """Forms the scores in float32: right for every head_dim on every device, but slow and large."""
    q, k, v = batch
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def sdpa_params(batch: Batch) -> SDPAParams:
    """What PyTorch's questions about its kernels take: no mask, no dropout, not causal, no grouped heads."""
    return SDPAParams(*batch, None, 0.0, False, False)
