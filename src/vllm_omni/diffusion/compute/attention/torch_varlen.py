"""Variable-length FlashAttention of PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from vllm_omni.diffusion.compute.attention.base import Setting
from vllm_omni.diffusion.compute.attention.limits import why_no_flash
from vllm_omni.diffusion.compute.attention.varlen import VarlenAttention
from vllm_omni.diffusion.compute.packing import Offsets


class TorchVarlenAttention(VarlenAttention):
    """Attention by `torch.nn.attention.varlen`, which is FlashAttention 2."""

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        return why_no_flash(setting)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        out = varlen_attn(
            q, k, v, offsets_q.cu_seqlens, offsets_k.cu_seqlens, offsets_q.max_length, offsets_k.max_length
        )
        assert isinstance(out, Tensor)
        return out

    def attend_packed_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        # PyTorch documents lse as [tokens, heads]; the kernel returns [heads, tokens].
        out, lse = varlen_attn(
            q,
            k,
            v,
            offsets_q.cu_seqlens,
            offsets_k.cu_seqlens,
            offsets_q.max_length,
            offsets_k.max_length,
            return_aux=AuxRequest(lse=True),
        )
        return out, lse
