"""Variable-length FlashAttention of vLLM: version 3 on Hopper, version 2 on other GPUs.

The only module of the engine core that imports vLLM, inside of functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.attention.base import Setting
from vllm_omni.diffusion.compute.attention.limits import why_no_flash
from vllm_omni.diffusion.compute.attention.varlen import VarlenAttention
from vllm_omni.diffusion.compute.packing import Offsets

HOPPER = 9
"""Major compute capability."""


class VllmFlashAttention(VarlenAttention):
    """Attention by vLLM's kernel for the current CUDA device."""

    def __init__(self) -> None:
        # Raises ImportError if `why_not` gives that as its reason.
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        self._kernel: Callable[..., Any] = flash_attn_varlen_func
        self._version = _version(torch.cuda.get_device_capability())

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        if reason := why_no_flash(setting):
            return reason
        assert setting.capability is not None
        try:
            has_version = _version(setting.capability) is not None
        except ImportError as error:
            return f"vLLM's FlashAttention does not import: {str(error).splitlines()[0]}"
        return None if has_version else "vLLM was built without a FlashAttention for this GPU"

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        out: Tensor = self._run(q, k, v, offsets_q, offsets_k)
        return out

    def attend_packed_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._run(q, k, v, offsets_q, offsets_k, return_softmax_lse=True)
        return out, lse

    def _run(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets, **settings: Any) -> Any:
        return self._kernel(
            q,
            k,
            v,
            max_seqlen_q=offsets_q.max_length,
            cu_seqlens_q=offsets_q.cu_seqlens,
            max_seqlen_k=offsets_k.max_length,
            cu_seqlens_k=offsets_k.cu_seqlens,
            fa_version=self._version,
            **settings,
        )


def _version(capability: tuple[int, int]) -> int | None:
    """FlashAttention version for a GPU; None: vLLM has none for it. Raises ImportError without vLLM."""
    from vllm.vllm_flash_attn import FA2_AVAILABLE, FA3_AVAILABLE

    if FA3_AVAILABLE and capability[0] == HOPPER:
        return 3
    return 2 if FA2_AVAILABLE else None
