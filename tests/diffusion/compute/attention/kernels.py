"""Stand-ins for the variable-length kernels of a GPU: what they are told, and what they say of nothing."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from vllm_omni.diffusion.compute.attention import torch_varlen

EMULATED = ("torch_varlen", "vllm_flash")
"""Backends whose kernels can be stood in for."""


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """-> as q, and [heads, tokens]; of a sequence without keys some output, and +inf, as FlashAttention 2 says."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.full_like(q, 7.0)
    lse = torch.full((q.shape[1], len(q)), torch.inf)
    for a, b, c, d in zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist()):
        if b > a and d > c:
            scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[c:d].float()) * q.shape[-1] ** -0.5
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d].float()).to(q.dtype)
            lse[:, a:b] = scores.logsumexp(-1)
    return out, lse


def emulate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where backend `name` looks for its kernel."""
    if name == "torch_varlen":
        signature = inspect.signature(varlen_attn)
        monkeypatch.setattr(
            torch_varlen, "varlen_attn", lambda *given, **named: _torch(signature.bind(*given, **named))
        )
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        install_vllm(monkeypatch, FA2_AVAILABLE=True, FA3_AVAILABLE=True, flash_attn_varlen_func=_vllm)


def install_vllm(monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    """A vLLM whose `vllm_flash_attn` holds `contents`."""
    module = ModuleType("vllm.vllm_flash_attn")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)


def _torch(bound: inspect.BoundArguments) -> Tensor | tuple[Tensor, Tensor]:
    given = bound.arguments
    check_lengths(given["cu_seq_q"], given["max_q"])
    check_lengths(given["cu_seq_k"], given["max_k"])
    out, lse = plain_varlen(given["query"], given["key"], given["value"], given["cu_seq_q"], given["cu_seq_k"])
    aux: AuxRequest | None = given.get("return_aux")
    return (out, lse) if aux is not None and aux.lse else out


def _vllm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor,
    return_softmax_lse: bool = False,
    fa_version: int = 2,
) -> Tensor | tuple[Tensor, Tensor]:
    assert fa_version == 3, "this GPU is said to be a Hopper"
    check_lengths(cu_seqlens_q, max_seqlen_q)
    check_lengths(cu_seqlens_k, max_seqlen_k)
    out, lse = plain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k)
    return (out, lse) if return_softmax_lse else out


def check_lengths(cu_seqlens: Tensor, longest: int) -> None:
    assert int(cu_seqlens.diff().max()) == longest
