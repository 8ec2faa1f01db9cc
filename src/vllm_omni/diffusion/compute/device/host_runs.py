"""Host memory for runs of weights: of one process, or one copy that the ranks of a replica share."""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import is_host

logger = logging.getLogger(__name__)

NewRun = Callable[[str, int], Tensor]
"""Makes a run of a component's weights, from its name and the number of bytes."""
REGION_BYTES = 2**40
"""Address space of a region in the shared file. Only pages that are written take memory."""


def host_run(num_bytes: int, device: torch.device) -> Tensor:
    """Host memory for a run: uint8 [num_bytes]. For a GPU it is pinned, so that copies need not be waited for.

    It is no memory of PyTorch's allocator of pinned memory, which takes up to twice the bytes and keeps them.
    """
    if is_host(device) or not num_bytes:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return _pinned(mmap.mmap(-1, num_bytes), device)


def own_runs(device: torch.device) -> NewRun:
    """Runs in memory of this process alone."""
    return lambda component, num_bytes: host_run(num_bytes, device)


def _pinned(memory: mmap.mmap, device: torch.device) -> Tensor:
    """Tensor uint8 [bytes] over a mapping, pinned for a GPU."""
    memory.madvise(mmap.MADV_HUGEPAGE)  # far fewer pages to pin, where the system allows it
    run = torch.frombuffer(memory, dtype=torch.uint8)
    if is_host(device):
        return run
    address, runtime = run.data_ptr(), torch.cuda.cudart()
    if (status := int(runtime.cudaHostRegister(address, len(run), 0))) != 0:
        logger.warning(
            "%.1f GB of host memory cannot be pinned (CUDA error %d): copies to the device are slow and waited for",
            len(run) / 1e9,
            status,
        )
        return run
    weakref.finalize(run, runtime.cudaHostUnregister, address).atexit = False
    return run


class SharedRuns:
    """Runs of which the ranks of a replica hold one copy together. All of them run on this host.

    Memory is a file without a name, as large as it may ever be. Regions of it belong to weights that are equal on
    several ranks. Each rank asks for the runs of a region in the same order, and writes the same bytes there.
    """

    def __init__(self, file: int, device: torch.device) -> None:
        """file: descriptor of the file, which stays open."""
        self._file = file
        self._device = device
        self._used: Counter[int] = Counter()
        """Bytes taken of each region."""

    @classmethod
    def of_ranks(cls, agree: Callable[[float], float], rank: int, num_regions: int, device: torch.device) -> SharedRuns:
        """Open the file that rank 0 makes. All ranks call this together. agree: maximum of the ranks' values.

        Raises OSError where a rank may not open files of another one.
        """
        own = os.memfd_create("vllm-omni-weights") if rank == 0 else 0
        if rank == 0:
            os.ftruncate(own, num_regions * REGION_BYTES)
        process, number = (int(agree(value if rank == 0 else 0)) for value in (os.getpid(), own))
        return cls(own if rank == 0 else os.open(f"/proc/{process}/fd/{number}", os.O_RDWR), device)

    def run(self, region: int, num_bytes: int) -> Tensor:
        """The next run of a region: uint8 [num_bytes], zeros at first, pinned for a GPU."""
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        start = self._used[region]
        self._used[region] += -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        assert self._used[region] <= REGION_BYTES
        return _pinned(mmap.mmap(self._file, num_bytes, offset=region * REGION_BYTES + start), self._device)
