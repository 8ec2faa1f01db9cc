"""Attention backends by name. A backend is one module and one entry here; its module is imported when first used."""

from __future__ import annotations

from importlib import import_module

from vllm_omni.diffusion.compute.attention.base import AttentionBackend, Setting
from vllm_omni.diffusion.data import AttentionBackendName

__all__ = ["BACKENDS", "AttentionBackend", "Setting", "backend_class", "create_attention"]

BACKENDS: dict[AttentionBackendName, str] = {
    "sdpa": "vllm_omni.diffusion.compute.attention.sdpa:SdpaAttention",
    "torch_varlen": "vllm_omni.diffusion.compute.attention.torch_varlen:TorchVarlenAttention",
    "cudnn": "vllm_omni.diffusion.compute.attention.cudnn:CudnnAttention",
    "vllm_flash": "vllm_omni.diffusion.compute.attention.vllm_flash:VllmFlashAttention",
}
"""Name -> `module:class`; the class takes no arguments."""


def backend_class(name: AttentionBackendName) -> type[AttentionBackend]:
    """Class of a backend, imported when first used."""
    module, _, cls = BACKENDS[name].partition(":")
    backend: type[AttentionBackend] = getattr(import_module(module), cls)
    return backend


def create_attention(name: AttentionBackendName | None = None) -> AttentionBackend:
    """Backend by name; None: `sdpa`, which runs on every device."""
    return backend_class(name or "sdpa")()
