"""Kinds of device: which kind `--device` means here, and how many devices of it this machine has."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.data import DeviceChoice, DiffusionParallelConfig
from vllm_omni.errors import ConfigError

CPU, CUDA = "cpu", "cuda"
MAX_CPU_WORKERS = 16
"""Most workers on one CPU, whose cores they share."""


def kind_of(choice: DeviceChoice) -> str:
    """Kind of the chosen device; `auto`: CUDA if PyTorch finds a GPU. Raises ConfigError for CUDA without one."""
    if choice == CUDA and not torch.cuda.is_available():
        raise ConfigError(f"--device {CUDA}: PyTorch finds no GPU on this machine; --device takes auto or {CPU} here")
    if choice == "auto":
        return CUDA if torch.cuda.is_available() else CPU
    return choice


def can_use_gpus() -> bool:
    """Whether this build of PyTorch supports CUDA. Does not initialize CUDA, which would break a later fork."""
    has_cuda: bool = torch.backends.cuda.is_built()
    return has_cuda


def num_devices(kind: str) -> int:
    """Devices of this kind on this machine; a CPU counts as one."""
    return torch.cuda.device_count() if kind == CUDA else 1


def free_cached_memory(device: torch.device) -> None:
    """Free the unused blocks of PyTorch's cache."""
    if device.type == CUDA:
        torch.cuda.empty_cache()


def check_world_size(parallel: DiffusionParallelConfig, device: DeviceChoice) -> None:
    """Raise ConfigError when `parallel` needs more devices than this machine has."""
    if kind_of(device) == CUDA:
        most, devices = torch.cuda.device_count(), "this machine has {} GPUs"
    else:
        most, devices = MAX_CPU_WORKERS, "a CPU takes at most {} workers"
    if parallel.world_size > most:
        raise ConfigError(f"{parallel.written_out()} devices are too many: {devices.format(most)}")
