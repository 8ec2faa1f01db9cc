"""Resolution of a config on the device: the kernels and the attention backend that the model runs with."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.compute.startup.attention_choice import choose_attention
from vllm_omni.diffusion.data import AttentionBackendName, KernelsName, OmniDiffusionConfig
from vllm_omni.errors import ConfigError


def check_device(config: OmniDiffusionConfig, device: Device) -> None:
    """Raise ConfigError for settings that `device` does not support. Measures nothing and asks no other rank."""
    if config.quantization == "fp8":
        device.check_float8(device.dtype(config.dtype))
    if config.overlap_decode:
        device.check_overlap()
    device.choose_kernels(config.kernels)


def resolve(
    config: OmniDiffusionConfig,
    info: ModelInfo,
    device: Device,
    ranks: Ranks,
    first_backend: AttentionBackendName | None,
) -> OmniDiffusionConfig:
    """The config with the kernels and the attention backend that the model runs with. All ranks call this together.

    A whole pipeline uses diffusers' attention, so its backend stays None.
    first_backend: the backend that the first start chose, which a restart keeps; None: this is the first start.
    Raises ConfigError for kernels or a backend that do not run here.
    """
    kernels = device.choose_kernels(config.kernels)
    if not isinstance(info, PackedModelInfo):
        return replace(config, kernels=kernels)
    dtype = device.dtype(config.dtype)
    check_kernels(kernels, device, dtype)
    backend = choose_attention(config, info, device, dtype, ranks, first_backend)
    return replace(config, kernels=kernels, attention_backend=backend)


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
