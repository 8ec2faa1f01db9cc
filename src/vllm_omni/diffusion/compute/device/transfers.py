"""Between the memory of the host and that of a device, whatever kind of device it is."""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")


def is_host(device: torch.device) -> bool:
    """Whether what is on `device` can be read without waiting for anybody."""
    return device.type == HOST.type


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on `device`; the host does not wait for the copy.

    Memory that the operating system may move is copied while the host waits, so the way leads through pinned memory,
    which PyTorch gives to nobody else before the copy is done. Rows must lie one behind the other: others would be
    gathered in memory that is not pinned.
    """
    return tensor if is_host(device) else tensor.contiguous().pin_memory().to(device, non_blocking=True)
