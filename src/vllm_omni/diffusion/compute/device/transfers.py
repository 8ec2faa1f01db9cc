"""Copies from the host's memory to a device."""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")


def is_host(device: torch.device) -> bool:
    """Whether tensors on `device` lie in the host's memory, so that reading them waits for nothing."""
    return device.type == HOST.type


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to `device` without waiting for the copy.

    Only a copy from pinned memory is asynchronous; PyTorch reuses that memory after the copy is done. A tensor with
    strides is made contiguous first, because PyTorch would gather it in memory that is not pinned.
    """
    return tensor if is_host(device) else tensor.contiguous().pin_memory().to(device, non_blocking=True)
