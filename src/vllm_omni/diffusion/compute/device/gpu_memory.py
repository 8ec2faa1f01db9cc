"""Bound on the memory that this process takes of a GPU, so that several servers can share it."""

from __future__ import annotations

import torch

CONTEXT_BYTES = 768 * 2**20
"""Memory that CUDA and its libraries take beside PyTorch's: the context, the code of kernels, workspaces."""


class GpuMemory:
    """Memory of one GPU: in all, used by others, and the budget of this process."""

    def __init__(self, device: torch.device, share: float) -> None:
        """Bound PyTorch's memory on `device`. share: of the GPU's memory that this process may take in all.

        Memory that others use at this time is not there for this process.
        """
        self._device = device
        free, self.total_bytes = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
        self.others_bytes = max(0, self.total_bytes - free - own)
        self.budget_bytes = min(int(share * self.total_bytes), self.total_bytes - self.others_bytes)
        self._most_bytes = max(0, self.budget_bytes - CONTEXT_BYTES)
        """Most bytes that PyTorch reserves."""
        torch.cuda.set_per_process_memory_fraction(self._most_bytes / self.total_bytes, device)

    def free_bytes(self) -> int:
        """Bytes that PyTorch can still allocate: those that it reserves and does not use included."""
        reserved, allocated = torch.cuda.memory_reserved(self._device), torch.cuda.memory_allocated(self._device)
        left = min(torch.cuda.mem_get_info(self._device)[0], self._most_bytes - reserved)
        return max(0, left) + reserved - allocated
