"""Tensor parallel layers: each rank of a group holds a slice of the weights and never sees the rest.

A column layer followed by a row layer costs one exchange: x -> column -> (this rank's features) -> row -> sum.

What follows a layer may add the bias itself, where it passes over the features anyway: `y = product(x) + late_bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.rounding import Rows


@runtime_checkable
class Sharded(Protocol):
    """A module whose parameters are slices of a checkpoint's."""

    cut_dims: ClassVar[Mapping[str, int]]
    """Parameter -> the dim of which this rank holds its share; parameters that are not listed are whole."""
    group: Group
    """The ranks that hold the shares, in order."""


class ColumnLinear(nn.Linear):
    """y = x W^T + b, of whose features each rank has its share. [..., in] -> [..., out / size].

    weight: [out / size, in]; bias: [out / size].
    """

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}
    is_float8: ClassVar[bool] = False
    """Whether `product` rounds its input to float8, unless it comes so."""
    late_bias: None = None

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        """Sizes of the whole layer. Raises ValueError when the ranks cannot share out_features equally."""
        super().__init__(in_features, _share("out_features", out_features, group), bias=bias)
        self.group = group

    def product(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        y: Tensor = self(x)
        return y


class RowLinear(nn.Linear):
    """y = x W^T + b, where each rank has its share of x's features and every rank gets all of y.

    [..., in / size] -> [..., out].
    weight: [out, in / size]; bias: [out], the same on all ranks and added once, after the sum.
    """

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 1}
    is_float8: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        """Sizes of the whole layer. Raises ValueError when the ranks cannot share in_features equally."""
        super().__init__(_share("in_features", in_features, group), out_features, bias=bias)
        self.group = group

    @property
    def late_bias(self) -> Tensor | None:
        return None if self.group.size == 1 else self.bias

    def product(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        if self.group.size == 1:
            return super().forward(x)
        return self.group.all_reduce(F.linear(x, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        y, bias = self.product(input), self.late_bias
        return y if bias is None else y.add_(bias)


class ColumnEmbedding(nn.Embedding):
    """An embedding of whose features each rank holds its share; every rank gets all. [...] -> [..., features].

    weight: [entries, features / size].
    """

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, num_embeddings: int, embedding_dim: int, group: Group) -> None:
        """Sizes of the whole layer. Raises ValueError when the ranks cannot share embedding_dim equally."""
        super().__init__(num_embeddings, _share("embedding_dim", embedding_dim, group))
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        return self.group.all_gather(super().forward(input)).movedim(0, -2).flatten(-2)


def _share(name: str, features: int, group: Group) -> int:
    if features % group.size:
        raise ValueError(f"{name} must be a multiple of the group's {group.size} ranks, got {features}")
    return features // group.size
