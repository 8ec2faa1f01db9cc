"""What the fused kernels compute, in plain PyTorch: the path of every device, and the oracle of the kernels' tests.

R: rows of modulation; `rows` [tokens] tells each token's, None: all have row 0. H heads of d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.diffusion.layers.norms import gated_add, norm_modulate, rms_norm
from vllm_omni.diffusion.layers.rope import rotate


@dataclass(frozen=True)
class Projected:
    """What a stream's projection made, and the norms of its queries and keys."""

    qkv: Tensor
    """[tokens, 3 * H * d]: queries, keys and values of all heads."""
    weight: Tensor
    """[2 * d]: of the queries' norm, then of the keys'."""


class TorchKernels:
    def norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> Tensor:
        """LayerNorm(x) * scale + shift. x: [tokens, D]; shift, scale (with its 1 added): [R, D] -> [tokens, D]."""
        return norm_modulate(x, _of_tokens(shift, rows), _of_tokens(scale, rows), eps)

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
        """x + gate * y. x, y: [tokens, D]; gate: [R, D]."""
        return gated_add(x, y, _of_tokens(gate, rows))

    def heads(
        self, streams: Sequence[Projected], order: Tensor | None, stream: Tensor | None, rotations: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """RMSNorm and rotation of queries and keys, in the order of attention -> q, k, v [tokens, H, d].

        streams: one or two; order: int64 [tokens], the row of their concatenation that each row of attention is, None:
        the same; stream: int64 [tokens], which of two each row of attention comes from; rotations: float32
        [tokens, 1, 1, d / 2, 2], in the order of attention.
        """
        weight = torch.stack([s.weight.view(2, 1, -1) for s in streams])
        joint = torch.cat([s.qkv for s in streams]) if len(streams) > 1 else streams[0].qkv
        if order is not None:
            joint = joint.index_select(0, order)
        qkv = joint.unflatten(1, (3, -1, weight.shape[-1]))
        scale = weight[0] if stream is None else weight.index_select(0, stream)
        q, k = rotate(rms_norm(qkv[:, :2], scale, eps), rotations).unbind(1)
        return q, k, qkv[:, 2]


def _of_tokens(values: Tensor, rows: Tensor | None) -> Tensor:
    return values[:1] if rows is None else values.index_select(0, rows)
