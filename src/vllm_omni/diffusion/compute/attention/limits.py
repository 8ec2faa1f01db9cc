"""Limits of FlashAttention kernels."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.compute.attention.base import Setting

LEAST_CAPABILITY = (8, 0)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256


def why_no_flash(setting: Setting, max_head_dim: int = MAX_HEAD_DIM) -> str | None:
    """Reason in one line why a FlashAttention kernel cannot run in `setting`; None: it can."""
    if setting.capability is None:
        return "needs a CUDA GPU"
    if setting.capability < LEAST_CAPABILITY:
        return f"needs compute capability {_dotted(LEAST_CAPABILITY)}, this GPU has {_dotted(setting.capability)}"
    if setting.dtype not in DTYPES:
        return f"takes {' and '.join(DTYPES.values())}, not {str(setting.dtype).removeprefix('torch.')}"
    if setting.head_dim % HEAD_DIM_MULTIPLE or setting.head_dim > max_head_dim:
        return f"takes heads of a multiple of {HEAD_DIM_MULTIPLE} up to {max_head_dim}, not {setting.head_dim}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
