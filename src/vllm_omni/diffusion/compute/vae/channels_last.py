"""Channels-last memory for decoders of diffusers' AutoencoderKL; convolutions are fastest in it.

PyTorch's group norm copies a channels-last tensor to contiguous memory and back, which costs more than the convolutions
gain. Therefore every norm is replaced by a fused one, which keeps the layout and includes the SiLU after it.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from vllm_omni.diffusion.compute.layers.kernels import Kernels


class GroupNorm(nn.Module):
    """Fused group norm with optional SiLU; its weights have the same names as those of `norm`."""

    def __init__(self, norm: nn.GroupNorm, kernels: Kernels, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.kernels, self.silu = kernels, silu

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] -> [N, C, ...] in the same memory layout."""
        return self.kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


def put_channels_last(decoder: Decoder, kernels: Kernels) -> None:
    """Change `decoder` in place. A convolution with channels-last weights converts its input to that layout."""
    decoder.to(memory_format=torch.channels_last)
    for block in decoder.modules():
        if isinstance(block, ResnetBlock2D):
            has_silu = isinstance(block.nonlinearity, nn.SiLU)
            block.norm1 = GroupNorm(block.norm1, kernels, has_silu)
            block.norm2 = GroupNorm(block.norm2, kernels, has_silu)
            if has_silu:
                block.nonlinearity = nn.Identity()
    decoder.conv_norm_out = GroupNorm(decoder.conv_norm_out, kernels, silu=True)
    decoder.conv_act = nn.Identity()
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):  # the norm of an attention block
                setattr(module, name, GroupNorm(child, kernels, silu=False))
