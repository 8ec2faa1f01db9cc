"""Errors that mean a lack of memory or a broken device."""

from __future__ import annotations

import torch


def is_device_failure(error: BaseException) -> bool:
    """Whether CUDA itself failed: further work in this process would raise other, misleading errors."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. PyTorch's CPU allocator and CUDA itself raise a plain RuntimeError for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = "can't allocate memory", "CUDA error: out of memory"
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)
