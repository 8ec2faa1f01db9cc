"""Measurements of this machine's device: matrix products at a model's shapes, attention, copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.roofline.costs import Attention, Gemm
from benchmarks.timing import BUDGET_SECONDS, Spread, measure
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.packing import Offsets
from vllm_omni.diffusion.data import AttentionBackendName


def gemm_seconds(gemm: Gemm, device: torch.device, dtype: torch.dtype, budget: float = BUDGET_SECONDS) -> Spread:
    """Seconds of one product of the shape `gemm`."""
    x = torch.randn(gemm.rows, gemm.inner, dtype=dtype, device=device)
    weight = torch.randn(gemm.columns, gemm.inner, dtype=dtype, device=device)
    return measure(lambda: torch.nn.functional.linear(x, weight), device, budget=budget)


def fp8_gemm_seconds(gemm: Gemm, device: torch.device, budget: float = BUDGET_SECONDS) -> Spread:
    """Seconds of one product in float8, with a scale for each row, into bfloat16; without rounding the input.

    Raises RuntimeError if the device has no such product.
    """
    x = torch.randn(gemm.rows, gemm.inner, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(gemm.columns, gemm.inner, device=device).to(torch.float8_e4m3fn)
    x_scale = torch.ones(gemm.rows, 1, device=device)
    weight_scale = torch.ones(1, gemm.columns, device=device)
    return measure(
        lambda: torch._scaled_mm(x, weight.t(), x_scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True),
        device,
        budget=budget,
    )


def attention_seconds(
    shapes: Sequence[Attention],
    backend: AttentionBackendName,
    device: torch.device,
    dtype: torch.dtype,
    budget: float = BUDGET_SECONDS,
) -> Spread:
    """Seconds of one layer's attention, all sequences in one pack.

    Raises ConfigError or NotAvailableError for a backend that does not run here.
    """
    attend = create_attention(backend).attend
    heads, head_dim = shapes[0].heads, shapes[0].head_dim
    offsets = Offsets.of([shape.queries for shape in shapes], device)
    q, k, v = (torch.randn(offsets.values[-1], heads, head_dim, dtype=dtype, device=device) for _ in range(3))
    return measure(lambda: attend(q, k, v, offsets, offsets), device, budget=budget)


def copy_seconds(num_bytes: int, device: torch.device, budget: float = BUDGET_SECONDS) -> Spread:
    """Seconds of a copy that reads and writes `num_bytes` each."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy: Callable[[], Tensor] = lambda: target.copy_(source)  # noqa: E731 - to be typed
    return measure(copy, device, budget=budget)
