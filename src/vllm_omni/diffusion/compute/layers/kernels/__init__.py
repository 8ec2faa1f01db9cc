"""Operations between the matrix products of a block or the convolutions of a VAE: plain PyTorch, or fused in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vllm_omni.diffusion.compute.layers.kernels.reference import Projected, TorchKernels
from vllm_omni.diffusion.compute.layers.rounding import Float8Rows, Rows
from vllm_omni.diffusion.data import KernelsName

__all__ = ["Kernels", "Projected", "TorchKernels", "create_kernels"]


class Kernels(Protocol):
    """Interface of the operations; `TorchKernels` documents each."""

    picks_rows: bool
    normalizes_channels_last: bool

    def norm_modulate(
        self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, float8: bool = False
    ) -> Rows: ...

    def gated_add(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        rows: Tensor | None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor: ...

    def gelu(self, x: Tensor, bias: Tensor | None, float8: bool = False) -> Rows: ...

    def round_rows(self, x: Tensor, positions: Tensor | None = None) -> Float8Rows: ...

    def heads(
        self, streams: Sequence[Projected], order: Tensor | None, stream: Tensor | None, rotations: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def wide_heads(
        self, projected: Projected, rotations: Tensor, eps: float, squares: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def wide_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, squares: Tensor | None = None
    ) -> Tensor: ...

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = False
    ) -> Tensor: ...


def create_kernels(name: KernelsName) -> Kernels:
    """Operations by name. `triton`: fused kernels for GPUs, which import Triton; otherwise plain PyTorch."""
    if name != "triton":
        return TorchKernels()
    from vllm_omni.diffusion.compute.layers.kernels.fused import TritonKernels

    return TritonKernels()
