"""Reference of the fused kernels in plain PyTorch. It runs on every device, and the kernels' tests compare with it.

R: rows of modulation; rows: int64 [tokens], the row of each token, None: row 0. H: heads; d: channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.diffusion.compute.layers.linear import ColumnLinear
from vllm_omni.diffusion.compute.layers.low_rank import AdaptedLayer, LayerChange, torch_changes
from vllm_omni.diffusion.compute.layers.norms import gated_add, norm_modulate, rms_norm, wide_rms_norm
from vllm_omni.diffusion.compute.layers.rope import rotate
from vllm_omni.diffusion.compute.layers.rounding import Float8Rows, Rows


@dataclass(frozen=True)
class Projected:
    """Output of a stream's projection to queries, keys and values, and the weights of their norms."""

    qkv: Tensor
    """[tokens, 3 * H * d]: queries, keys and values of all heads."""
    weight: Tensor
    """[2 * d]: weight of the queries' norm, then of the keys' norm. Norms over all heads at once: [2 * H * d]."""
    bias: Tensor | None = None
    """[3 * H * d]: bias that is not added to `qkv` yet."""


class TorchKernels:
    """Operations in plain PyTorch.

    bias: the bias that the matrix product before has left out. float8: round the result for the matrix product behind.
    """

    picks_rows = False
    """Whether reading rows at `positions` costs no extra pass over memory."""
    normalizes_channels_last = False
    """Whether `group_norm` reads and writes channels-last memory without a copy."""

    def layer_changes(self, layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
        """Changes of all layers of a pack by adapters, on `device`."""
        return torch_changes(layers, device)

    def norm_modulate(
        self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, float8: bool = False
    ) -> Rows:
        """LayerNorm(x) * scale + shift: [tokens, D] -> [tokens, D]. shift, scale: [R, D]; `scale` includes the 1."""
        return _rounded(norm_modulate(x, _of_tokens(shift, rows), _of_tokens(scale, rows), eps), float8)

    def gated_add(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        rows: Tensor | None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x + gate * (y + bias); in float16 clamped to finite numbers. x: [tokens, D]; gate: [R, D]; bias: [D].

        y: [tokens, D]; or with `positions`, int64 [tokens], more rows: token i has row positions[i].
        """
        return gated_add(x, _biased(_picked(y, positions), bias), _of_tokens(gate, rows))

    def gelu(self, x: Tensor, bias: Tensor | None, float8: bool = False) -> Rows:
        """GELU(x + bias), approximated with tanh. x: [tokens, D]; bias: [D] -> [tokens, D]."""
        return _rounded(F.gelu(_biased(x, bias), approximate="tanh"), float8)

    def linear_gelu(self, layer: ColumnLinear, x: Rows, float8: bool = False) -> Rows:
        """GELU of a layer's output, approximated with tanh: [tokens, inputs] -> [tokens, outputs]."""
        if layer.change is not None and isinstance(x, Tensor) and not (layer.is_float8 or float8):
            together = layer.change.linear_gelu(x, layer.weight, layer.bias)
            if together is not None:
                return together
        return self.gelu(layer.product(x), layer.late_bias, float8)

    def round_rows(self, x: Tensor, positions: Tensor | None = None) -> Float8Rows:
        """Round [rows, D] to float8: all rows, or those at `positions`, int64 [tokens]."""
        return Float8Rows.of(_picked(x, positions))

    def heads(
        self, streams: Sequence[Projected], order: Tensor | None, stream: Tensor | None, rotations: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after RMSNorm and rotation, and values: q, k, v [tokens, H, d] in the order of attention.

        streams: one or two. order: int64 [tokens], row of the concatenated streams for each row of attention; None: the
        same order. stream: int64 [tokens], number of the stream that each row of attention comes from. rotations:
        float32 [tokens, 1, 1, d / 2, 2], in the order of attention.
        """
        weight = torch.stack([s.weight.view(2, 1, -1) for s in streams])
        parts = [_biased(s.qkv, s.bias) for s in streams]
        joint = torch.cat(parts) if len(parts) > 1 else parts[0]
        if order is not None:
            joint = joint.index_select(0, order)
        qkv = joint.unflatten(1, (3, -1, weight.shape[-1]))
        scale = weight[0] if stream is None else weight.index_select(0, stream)
        q, k = rotate(rms_norm(qkv[:, :2], scale, eps), rotations).unbind(1)
        return q, k, qkv[:, 2]

    def wide_heads(
        self, projected: Projected, rotations: Tensor, eps: float, squares: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after RMSNorm over all heads and rotation, and values: q, k, v [tokens, H, d] of this rank.

        rotations: float32 [tokens, 1, 1, d / 2, 2]. squares: float32 [tokens, 2], mean square of the queries and of the
        keys over the heads of all ranks (`norms.shared_squares`); None: this rank has all heads.
        """
        qkv = _biased(projected.qkv, projected.bias).unflatten(1, (3, -1))
        normed = wide_rms_norm(qkv[:, :2], projected.weight.view(2, -1), eps, squares)
        q, k = rotate(normed.unflatten(-1, (-1, 2 * rotations.shape[-2])), rotations).unbind(1)
        return q, k, qkv[:, 2].unflatten(-1, q.shape[1:])

    def wide_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, squares: Tensor | None = None
    ) -> Tensor:
        """RMSNorm of x + bias over all heads: [tokens, H * d] -> the same shape. weight, bias: [H * d].

        squares: float32 [tokens], mean square over the heads of all ranks; None: this rank has all heads.
        """
        return wide_rms_norm(_biased(x, bias), weight, eps, squares)

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = False
    ) -> Tensor:
        """GroupNorm, then SiLU if asked for. x: [N, C, ...] -> the same shape; weight, bias: [C], None: 1 and 0."""
        out = F.group_norm(x, num_groups, weight, bias, eps)
        return F.silu(out) if silu else out


def _rounded(x: Tensor, float8: bool) -> Rows:
    return Float8Rows.of(x) if float8 else x


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _picked(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x.index_select(0, positions)


def _of_tokens(values: Tensor, rows: Tensor | None) -> Tensor:
    return values[:1] if rows is None else values.index_select(0, rows)
