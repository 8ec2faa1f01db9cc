"""Attention backends by name. A backend is one file and one entry here, imported only when chosen."""

from __future__ import annotations

from importlib import import_module

from vllm_omni.diffusion.attention.base import AttentionBackend
from vllm_omni.errors import ConfigError

__all__ = ["BACKENDS", "AttentionBackend", "create_attention"]

BACKENDS: dict[str, str] = {"sdpa": "vllm_omni.diffusion.attention.sdpa:SdpaAttention"}
"""Name -> `module:class`; the class takes no arguments."""


def create_attention(name: str | None = None) -> AttentionBackend:
    """The backend of that name; None takes `sdpa`, which runs everywhere. Raises ConfigError for unknown names."""
    name = name or "sdpa"
    if name not in BACKENDS:
        raise ConfigError(f"--attention-backend takes {', '.join(BACKENDS)}, got {name!r}")
    module, _, cls = BACKENDS[name].partition(":")
    backend: AttentionBackend = getattr(import_module(module), cls)()
    return backend
