"""Tensor parallel layers: each rank of a group holds a shard of the weights.

A column layer followed by a row layer costs one exchange: x -> column -> (this rank's features) -> row -> sum.

A fused operation behind a layer may add the bias: `y = product(x) + late_bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.low_rank import Adaptable
from vllm_omni.diffusion.compute.layers.rounding import Rows


@runtime_checkable
class Sharded(Protocol):
    """A module whose parameters are shards of those in a checkpoint."""

    cut_dims: ClassVar[Mapping[str, int]]
    """Parameter -> its sharded dim; parameters that are not listed are whole."""
    group: Group
    """Ranks that hold the shards, in order."""


@runtime_checkable
class KeepsFloat32(Protocol):
    """A module with parameters that are in float32 at least, whatever the dtype of the model."""

    float32_parameters: ClassVar[tuple[str, ...]]
    """Names of these parameters, which the module itself owns."""


class Linear(Adaptable, nn.Linear):
    """y = x W^T + b, and the changes of adapters."""

    def forward(self, input: Tensor) -> Tensor:
        if self.change is None:
            return super().forward(input)
        return self.change.linear(input, self.weight, self.bias)


class Float32Linear(Linear):
    """y = x W^T + b in float32 at least, whatever the dtype of the model."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")


class ColumnLinear(Linear):
    """y = x W^T + b: [..., in] -> [..., out / size]. weight: [out / size, in]; bias: [out / size]."""

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}
    is_float8: ClassVar[bool] = False
    """Whether `product` rounds its input to float8, unless it is in float8 already."""
    late_bias: None = None
    """Bias that `product` leaves out; None: none is left out."""

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        """Layer from the sizes over all ranks. Raises ValueError if the ranks cannot share out_features equally."""
        super().__init__(in_features, _share("out_features", out_features, group), bias=bias)
        self.group = group

    def product(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        y: Tensor = self(x)
        return y


class RowLinear(Linear):
    """y = x W^T + b; each rank has its share of the features of x, and every rank gets all of y.

    [..., in / size] -> [..., out].
    weight: [out, in / size]; bias: [out], the same on all ranks, added once after the sum.
    """

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 1}
    is_float8: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        """Layer from the sizes over all ranks. Raises ValueError if the ranks cannot share in_features equally."""
        super().__init__(_share("in_features", in_features, group), out_features, bias=bias)
        self.group = group

    @property
    def late_bias(self) -> Tensor | None:
        return None if self.group.size == 1 else self.bias

    def product(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)
        if self.group.size == 1:
            return super().forward(x)
        y = F.linear(x, self.weight) if self.change is None else self.change.linear(x, self.weight, None)
        return self.group.all_reduce(y)

    def forward(self, input: Tensor) -> Tensor:
        y, bias = self.product(input), self.late_bias
        return y if bias is None else y.add_(bias)


class ColumnEmbedding(nn.Embedding):
    """Embedding whose features the ranks share; every rank gets all. weight: [entries, features / size]."""

    cut_dims: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, num_embeddings: int, embedding_dim: int, group: Group) -> None:
        """Layer from the sizes over all ranks. Raises ValueError if the ranks cannot share embedding_dim equally."""
        super().__init__(num_embeddings, _share("embedding_dim", embedding_dim, group))
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        return self.group.all_gather(super().forward(input)).movedim(0, -2).flatten(-2)


def _share(name: str, features: int, group: Group) -> int:
    """Features of one rank."""
    if features % group.size:
        raise ValueError(f"{name} must be a multiple of the group's {group.size} ranks, got {features}")
    return features // group.size
