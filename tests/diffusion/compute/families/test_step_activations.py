"""Predicted peak of a step, compared with the bytes that tensors hold. Fused kernels allocate their results only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from testbed.live_bytes import LiveBytes
from testbed.runner_driver import make_request
from testbed.tiny_models import build_tiny_qwen_image
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.families import component_loader
from vllm_omni.diffusion.compute.families.component_loader import ComponentLoader
from vllm_omni.diffusion.compute.layers import fp8
from vllm_omni.diffusion.compute.layers.kernels import TorchKernels
from vllm_omni.diffusion.compute.startup.model_start import pipeline_class
from vllm_omni.diffusion.data import OmniDiffusionConfig

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": lambda path: build_tiny_qwen_image(path, heads=4, head_dim=32),
    "z_image": lambda path: build_tiny_z_image(path, heads=4),
    "wan": build_tiny_wan,
}


def counted_once(live: LiveBytes, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, of whose memory only its result is counted, beside its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with live.paused():
            made = run(*args, **kwargs)
        live.count((args, kwargs, made))
        return made

    return call


def stacked_heads(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Queries, keys and values in one tensor, as the fused kernel makes them."""
    return torch.stack(TorchKernels.heads(*args, **kwargs)).unbind()


def fused_kernels(live: LiveBytes) -> TorchKernels:
    """Kernels that compute in plain PyTorch, and of which only the results are counted."""
    kernels = TorchKernels()
    kernels.picks_rows = True  # as the fused kernels
    for name in ("norm_modulate", "gated_add", "gelu", "round_rows", "wide_heads", "wide_norm"):
        setattr(kernels, name, counted_once(live, getattr(kernels, name)))
    kernels.heads = counted_once(live, lambda *args: stacked_heads(kernels, *args))  # type: ignore[method-assign]
    return kernels


@torch.inference_mode()
def counted_peak(info: PackedModelInfo, quantization: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Tokens of a step of two branches at 256x256, and the most bytes that tensors besides the weights held in it."""
    config = OmniDiffusionConfig(model=str(info.path), quantization=quantization)
    loader = ComponentLoader(config, info, torch.device("cpu"), torch.float32, lambda count: None, Mesh.single())
    live = LiveBytes()
    monkeypatch.setattr(fp8, "fp8_product", counted_once(live, fp8.fp8_product))
    with patch.object(component_loader, "create_kernels", lambda name: fused_kernels(live)):
        pipeline = pipeline_class(info.family).build(loader)  # type: ignore[attr-defined]
    request = make_request("r", height=256, width=256, negative_prompt="blurry", num_inference_steps=2)
    state = pipeline.encode(request)
    pipeline.predict([state])  # makes the layout, which later steps share
    modules = (module for part in loader.components.values() for module in part)
    live.ignore([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])
    with live:
        pipeline.predict([state])
    return sum(state.sequence_lengths), live.peak


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_step_holds_as_much_as_predicted(
    family: str, quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = load_model_info(str(BUILDERS[family](tmp_path)))
    assert isinstance(info, PackedModelInfo)
    num_tokens, counted = counted_peak(info, quantization, monkeypatch)
    input_bytes = None if quantization is None else 1
    assert info.step_activation_bytes(num_tokens, 4, input_bytes=input_bytes) == pytest.approx(counted, rel=0.1)


def test_ranks_share_what_is_as_wide_as_all_heads(tiny_model: Path) -> None:
    info = load_model_info(str(tiny_model))
    assert isinstance(info, PackedModelInfo)
    alone, shared = (info.step_activation_bytes(1000, 2, tensor_size=size) for size in (1, 3))
    assert 0.5 * alone < shared < 0.7 * alone
    assert info.step_activation_bytes(2000, 2) == 2 * alone
