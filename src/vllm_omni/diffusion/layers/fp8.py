"""Linear layers in float8 (e4m3fn, arXiv 2209.05433): weights with a scale an output channel, inputs with one a token.

A GPU multiplies the float8 values as they are (`torch._scaled_mm`); a CPU rounds alike and multiplies in float32, or
in the inputs' dtype where that is wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.layers.linear import ColumnLinear, RowLinear
from vllm_omni.diffusion.transfers import is_host
from vllm_omni.errors import ConfigError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
GPU_MULTIPLE = 16
"""What both sizes of a weight must be a multiple of for a GPU's product."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n] -> float8 [rows, n] and the scale that each row is multiplied with, float32 [rows, 1].

    The largest magnitude of a row becomes float8's largest. A row with an infinity or a NaN is NaN, others are not.
    """
    x = x.float()
    # A row of zeros has a scale, too, and it is no subnormal number, which devices may take for zero.
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(FLOAT8), scale


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b. [tokens, in] -> [tokens, out], in x's dtype, which is bfloat16 on a GPU.

    weight: float8 [out, in]; scale: float32 [out, 1]; bias: [out] in x's dtype. What a token becomes depends on
    no other token, up to the rounding of sums.
    """
    values, scales = quantize(x)
    if not is_host(x.device):
        y = torch._scaled_mm(values, weight.t(), scales, scale.t(), out_dtype=x.dtype, use_fast_accum=True)
        # cuBLAS has no kernel with a bias for a few tokens and long rows. Compiled, it is part of what follows.
        return y if bias is None else y + bias
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(values.to(wide), weight.to(wide)) * scales * scale.t()
    return (y if bias is None else y + bias).to(x.dtype)


class Fp8ColumnLinear(nn.Module):
    """A `ColumnLinear` in float8. weight: float8 [out / size, in]; scale: float32 [out / size, 1]."""

    cut_dims: ClassVar[Mapping[str, int]] = ColumnLinear.cut_dims

    def __init__(self, linear: ColumnLinear | RowLinear) -> None:
        """The sizes, the bias and the ranks of `linear`; the weight is not taken over, but loaded."""
        super().__init__()
        self.group = linear.group
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FLOAT8), requires_grad=False)
        self.scale: Tensor
        # No parameter: a checkpoint has none.
        self.register_buffer("scale", linear.weight.new_empty((linear.out_features, 1), dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return fp8_linear(input, self.weight, self.scale, self.bias)


class Fp8RowLinear(Fp8ColumnLinear):
    """A `RowLinear` in float8. weight: float8 [out, in / size]; scale: float32 [out, 1].

    Scales are those of the rank's own share of a row, of weights and inputs alike: they need no exchange and round no
    coarser than a whole row's, but the sum is not, to the last bit, what one rank alone computes.
    """

    cut_dims: ClassVar[Mapping[str, int]] = RowLinear.cut_dims

    def forward(self, input: Tensor) -> Tensor:
        if self.group.size == 1:
            return super().forward(input)
        total = self.group.all_reduce(fp8_linear(input, self.weight, self.scale, None))
        return total if self.bias is None else total.add_(self.bias)


def keep_in_float8(module: nn.Module, names: Sequence[str], device: torch.device) -> None:
    """Put float8 layers in place of those of `module`, on the meta device, whose names end with one of `names`.

    device: that it will be moved to. Raises ConfigError for sizes whose product that one does not compute.
    """
    for path, linear in list(module.named_modules()):
        if path.rpartition(".")[2] not in names:
            continue
        assert isinstance(linear, (ColumnLinear, RowLinear)), f"{path} is a {type(linear).__name__}"
        out, inner = linear.weight.shape
        if not is_host(device) and (out % GPU_MULTIPLE or inner % GPU_MULTIPLE):
            raise ConfigError(
                f"--quantization fp8 takes layers whose sizes are multiples of {GPU_MULTIPLE} on a GPU, "
                f"got {out} x {inner} ({path})"
            )
        fp8 = Fp8ColumnLinear if isinstance(linear, ColumnLinear) else Fp8RowLinear
        module.set_submodule(path, fp8(linear))
