"""Budget of a process on a GPU: the share, what others use, and what is left of it; with a fake of PyTorch's counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_omni.diffusion.compute.device.gpu_memory import CONTEXT_BYTES, GpuMemory

GIB = 2**30
GPU = torch.device("cuda", 0)


class FakeGpu:
    """Counts of a GPU of 80 GiB."""

    def __init__(self, others: int) -> None:
        self.others, self.reserved, self.allocated = others, 0, 0
        self.fraction = 1.0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 80 * GIB - self.others - CONTEXT_BYTES - self.reserved, 80 * GIB

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated


def gpu_with(monkeypatch: pytest.MonkeyPatch, others: int) -> FakeGpu:
    gpu = FakeGpu(others)
    fake = SimpleNamespace(cuda=gpu)
    monkeypatch.setattr("vllm_omni.diffusion.compute.device.gpu_memory.torch", fake)
    return gpu


def test_a_share_bounds_what_pytorch_may_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_with(monkeypatch, 0)
    memory = GpuMemory(GPU, 0.5)
    assert (memory.total_bytes, memory.others_bytes, memory.budget_bytes) == (80 * GIB, 0, 40 * GIB)
    assert gpu.fraction * 80 * GIB == pytest.approx(40 * GIB - CONTEXT_BYTES)


def test_what_is_free_follows_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_with(monkeypatch, 0)
    memory = GpuMemory(GPU, 0.5)
    assert memory.free_bytes() == 40 * GIB - CONTEXT_BYTES
    gpu.reserved, gpu.allocated = 30 * GIB, 20 * GIB
    assert memory.free_bytes() == 20 * GIB - CONTEXT_BYTES
    gpu.reserved = gpu.allocated = 41 * GIB  # by a call that PyTorch does not bound
    assert memory.free_bytes() == 0


def test_two_servers_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_with(monkeypatch, 40 * GIB)
    memory = GpuMemory(GPU, 0.5)
    assert (memory.others_bytes, memory.budget_bytes) == (40 * GIB, 40 * GIB)
    assert GpuMemory(GPU, 0.92).budget_bytes == 40 * GIB
    gpu.others = 60 * GIB  # another server grew: the driver has less than the budget
    assert memory.free_bytes() == 20 * GIB - CONTEXT_BYTES


def test_own_memory_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_with(monkeypatch, 3 * GIB)
    gpu.reserved = 10 * GIB
    assert GpuMemory(GPU, 1.0).others_bytes == 3 * GIB
