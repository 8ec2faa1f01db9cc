"""Check of the fused kernels, before weights are read."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.data import KernelsName
from vllm_omni.errors import ConfigError


def check_kernels(name: KernelsName, device: Device, dtype: torch.dtype) -> None:
    """Raise ConfigError when Triton cannot compile a kernel: without a C compiler, for example."""
    if name != "triton":
        return
    x = torch.ones((2, 16), dtype=dtype, device=device.torch)
    try:
        create_kernels(name).gated_add(x, x, x[:1], None)
        device.synchronize()
    except Exception as error:  # an import, a compiler or a driver may raise anything
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"--kernels triton does not run here: {reason}; --kernels torch does") from error
