"""Float8 e4m3fn written out, to compare with: its values by definition, and diffusers' models that round to them."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear

LARGEST = 448.0
# 4 bits of exponent with bias 7, 3 of mantissa; exponent 0 is subnormal, and the largest code is the NaN.
MAGNITUDES = torch.tensor(
    [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1],
    dtype=torch.float64,
)


def round_to_float8(x: Tensor) -> Tensor:
    """The nearest of the values, of two the one with an even mantissa. |x| <= 448 -> float64."""
    magnitude = x.double().abs()
    above = torch.searchsorted(MAGNITUDES, magnitude).clamp(1, len(MAGNITUDES) - 1)
    middle = (MAGNITUDES[above - 1] + MAGNITUDES[above]) / 2
    take_above = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    return torch.where(take_above, MAGNITUDES[above], MAGNITUDES[above - 1]).copysign(x.double())


def rounded(x: Tensor) -> Tensor:
    """[..., n] with each row rounded at the scale that makes its largest magnitude 448 -> float64."""
    scale = (x.float().abs().amax(-1, keepdim=True) / LARGEST).clamp(min=2.0**-126)
    return round_to_float8(x.float() / scale) * scale


def layer_of(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Fp8ColumnLinear:
    """One rank's layer of a weight in float8 [out, in], its scales [out, 1] and a bias [out]."""
    out, inner = weight.shape
    with torch.device("meta"):
        layer = Fp8ColumnLinear(ColumnLinear(inner, out, Group.alone(), bias=bias is not None))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.scale = scale
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class RoundedLinear(nn.Module):
    """A linear layer of rounded weights and inputs, computed exactly."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = rounded(linear.weight.detach())
        bias: Tensor | None = linear.bias  # torch's stub lacks the None
        self.bias = None if bias is None else bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded(x), self.weight, self.bias).to(x.dtype)


def round_linears(model: nn.Module, pattern: str) -> int:
    """Let those of diffusers' linear layers whose names match round as well -> how many."""
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and re.search(pattern, name)
    ]
    for name in found:
        model.set_submodule(name, RoundedLinear(model.get_submodule(name)))  # type: ignore[arg-type]
    return len(found)
