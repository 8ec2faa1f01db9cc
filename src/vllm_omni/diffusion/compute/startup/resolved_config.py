"""Resolution of a config on the device: every `auto` and every choice that is measured becomes a value."""

from __future__ import annotations

from dataclasses import replace

from vllm_omni.diffusion.catalog.registry import ModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.startup.attention_choice import choose_attention
from vllm_omni.diffusion.compute.startup.kernel_check import check_kernels
from vllm_omni.diffusion.data import AttentionBackendName, OmniDiffusionConfig


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
    if info.whole is not None:
        return replace(config, kernels=kernels)
    dtype = device.dtype(config.dtype)
    check_kernels(kernels, device, dtype)
    backend = choose_attention(config, info, device, dtype, ranks, first_backend)
    return replace(config, kernels=kernels, attention_backend=backend)
