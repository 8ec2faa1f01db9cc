"""PyTorch's scaled_dot_product_attention, which runs on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from vllm_omni.diffusion.compute.attention.base import Setting
from vllm_omni.diffusion.compute.attention.dense import Batch, DenseAttention

HEAD_DIM_MULTIPLE = 8
"""Head sizes that the flash and the memory-efficient kernel take. The public function pads other sizes."""


class SdpaAttention(DenseAttention):
    """Attention by the kernel that PyTorch chooses.

    The public function does not return the log-sum-exp. With it, the flash kernel runs if it takes the tensors,
    otherwise the memory-efficient kernel, which also takes float32.
    """

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
                return out, lse[..., : q.shape[2]]  # the kernel pads the length to a multiple of 32
        return attend_by_definition(batch)


def attend_by_definition(batch: Batch) -> tuple[Tensor, Tensor]:
    """Attention from the scores in float32: for every head_dim and device, but slow and with much memory."""
    q, k, v = batch
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def sdpa_params(batch: Batch) -> SDPAParams:
    """Arguments of PyTorch's `can_use_..._attention`: no mask, no dropout, not causal, no grouped heads."""
    return SDPAParams(*batch, None, 0.0, False, False)
