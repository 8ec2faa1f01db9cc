"""OpenAI-compatible image and video serving for diffusion transformers, as a vLLM plugin."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_omni.omni import AsyncOmni, Omni

__all__ = ["AsyncOmni", "Omni", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy: vLLM imports this package in every process, and `--help` must not pay for an engine.
    if name in ("AsyncOmni", "Omni"):
        return getattr(import_module("vllm_omni.omni"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
