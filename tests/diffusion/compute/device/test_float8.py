"""GPUs and dtypes that `--quantization fp8` refuses."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.errors import ConfigError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device of kind CUDA without a GPU behind it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")
    monkeypatch.setattr("vllm_omni.diffusion.compute.device.device.GpuMemory", lambda *_: None)
    return Device("cuda")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9)])
def test_a_gpu_without_float8_is_refused(
    gpu: Device, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    with pytest.raises(
        ConfigError, match=r"--quantization fp8 takes a GPU .* 9\.0 or newer, got Old Card of"
    ) as caught:
        gpu.check_float8(torch.bfloat16)
    assert str(caught.value).endswith("of {}.{}".format(*capability))


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_float8_on_a_gpu_needs_bfloat16(
    gpu: Device, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    gpu.check_float8(torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ConfigError, match=f"takes --dtype bfloat16 on a GPU, got {str(dtype)[6:]}"):
            gpu.check_float8(dtype)


def test_float8_on_a_cpu_takes_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        Device("cpu").check_float8(dtype)
