"""Linear layers in float8: weights with one scale for each output channel, inputs with one for each token.

A GPU multiplies float8 values (`torch._scaled_mm`). A CPU rounds in the same way and multiplies in float32, or in the
dtype of the inputs if that is wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.transfers import is_host
from vllm_omni.diffusion.compute.layers.linear import ColumnLinear, RowLinear
from vllm_omni.diffusion.compute.layers.low_rank import Adaptable
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8, Float8Rows, Rows
from vllm_omni.errors import ConfigError

GPU_MULTIPLE = 16
"""Both sizes of a weight must be multiples of this for the product on a GPU."""


def fp8_product(x: Rows, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T: [tokens, in] -> [tokens, out], in the dtype of x, which is bfloat16 on a GPU.

    weight: float8 [out, in]; scale: float32 [out, 1].
    The result for a token depends on no other token, up to the rounding of sums.
    """
    values, scales, dtype = Float8Rows.of(x) if isinstance(x, Tensor) else x
    if not is_host(values.device):
        return torch._scaled_mm(values, weight.t(), scales, scale.t(), out_dtype=dtype, use_fast_accum=True)
    wide = torch.promote_types(dtype, torch.float32)
    return (F.linear(values.to(wide), weight.to(wide)) * scales * scale.t()).to(dtype)


class Fp8ColumnLinear(Adaptable):
    """`ColumnLinear` in float8. weight: float8 [out / size, in]; scale: float32 [out / size, 1]."""

    cut_dims: ClassVar[Mapping[str, int]] = ColumnLinear.cut_dims
    is_float8: ClassVar[bool] = True

    def __init__(self, linear: ColumnLinear | RowLinear) -> None:
        """Layer with the sizes, bias and group of `linear`; the weight is loaded later."""
        super().__init__()
        self.group = linear.group
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FLOAT8), requires_grad=False)
        self.scale: Tensor
        # A buffer and no parameter: a checkpoint has no scales.
        self.register_buffer("scale", linear.weight.new_empty((linear.out_features, 1), dtype=torch.float32))
        self.bias = linear.bias

    @property
    def late_bias(self) -> Tensor | None:
        """The bias. `product` leaves it out: cuBLAS has no product with a bias for few tokens and long rows."""
        return self.bias

    def product(self, x: Rows) -> Tensor:
        y = fp8_product(x, self.weight, self.scale)
        return y if self.change is None else self.change.add_to(y, x)

    def forward(self, input: Tensor) -> Tensor:
        y = self.product(input)
        return y if self.bias is None else y + self.bias


class Fp8RowLinear(Fp8ColumnLinear):
    """`RowLinear` in float8. weight: float8 [out, in / size]; scale: float32 [out, 1].

    Scales of weights and inputs are those of this rank's share of a row. They need no exchange and round no coarser
    than the scale of the whole row, but the sum differs in its last bits from the result of one rank.
    """

    cut_dims: ClassVar[Mapping[str, int]] = RowLinear.cut_dims

    def product(self, x: Rows) -> Tensor:
        return self.group.all_reduce(super().product(x))


def keep_in_float8(module: nn.Module, names: Sequence[str], device: torch.device) -> None:
    """Replace the linear layers of `module` whose last name is in `names` by float8 layers, on the meta device.

    device: where the module will be moved; the meta device takes all sizes. Raises ConfigError for sizes that this
    device cannot multiply in float8.
    """
    for path, linear in list(module.named_modules()):
        if path.rpartition(".")[2] not in names:
            continue
        assert isinstance(linear, (ColumnLinear, RowLinear)), f"{path} is a {type(linear).__name__}"
        out, inner = linear.weight.shape
        if not is_host(device) and device.type != "meta" and (out % GPU_MULTIPLE or inner % GPU_MULTIPLE):
            raise ConfigError(
                f"--quantization fp8 takes layers whose sizes are multiples of {GPU_MULTIPLE} on a GPU, "
                f"got {out} x {inner} ({path})"
            )
        fp8 = Fp8ColumnLinear if isinstance(linear, ColumnLinear) else Fp8RowLinear
        module.set_submodule(path, fp8(linear))
