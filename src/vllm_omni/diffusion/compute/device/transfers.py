"""Copies between the host's memory and a device."""

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


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor from a device to pinned memory of the host, without waiting for the copy.

    Only work of the same stream may read the result, such as a copy back to the device.
    """
    if is_host(tensor.device):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
