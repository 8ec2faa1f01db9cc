"""Operations between the matrix products of a block or the convolutions of a VAE: plain PyTorch, or fused in Triton."""

from __future__ import annotations

from vllm_omni.diffusion.compute.layers.kernels.reference import Projected, TorchKernels
from vllm_omni.diffusion.data import KernelsName

__all__ = ["Kernels", "Projected", "TorchKernels", "create_kernels"]

Kernels = TorchKernels
"""Any implementation of the operations: `TritonKernels` overrides them all."""


def create_kernels(name: KernelsName) -> Kernels:
    """Operations by name. `triton`: fused kernels for GPUs, which import Triton; otherwise plain PyTorch."""
    if name != "triton":
        return TorchKernels()
    from vllm_omni.diffusion.compute.layers.kernels.fused import TritonKernels

    return TritonKernels()
