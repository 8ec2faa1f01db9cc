"""Low-rank changes of linear layers for some of their rows: `y[rows] += scale * B (A x[rows])`. Nothing is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.layers.rounding import Rows


@dataclass(frozen=True)
class UpWeight:
    """B of one part of a layer: a layer may hold several layers of the checkpoint, whose outputs lie side by side."""

    columns: slice
    """Outputs of the part on this rank."""
    ranks: slice
    """Rows of `LayerWeights.down` that belong to the part."""
    weight: Tensor
    """[columns, ranks]"""


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one adapter for one layer, on this rank, in the dtype of the layer's inputs."""

    down: Tensor
    """A of all parts: [ranks of all parts, inputs]."""
    ups: tuple[UpWeight, ...]

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + sum(up.weight.nbytes for up in self.ups)

    def to(self, device: torch.device) -> LayerWeights:
        """The same weights on a device."""
        ups = tuple(replace(up, weight=up.weight.to(device)) for up in self.ups)
        return LayerWeights(self.down.to(device), ups)


@dataclass(frozen=True)
class ChangedRows:
    """Rows of a layer's input that one adapter changes."""

    rows: slice | Tensor
    """A range, or int64 [rows], the positions."""
    scale: float | Tensor
    """One for all rows, or float32 [rows, 1]."""

    def of(self, x: Rows) -> Tensor:
        """These rows of x, [rows, inputs]. A row in float8 is used as it was rounded, like by the layer itself."""
        if isinstance(x, Tensor):
            return self._select(x)
        return (self._select(x.values).float() * self._select(x.scale)).to(x.dtype)

    def add(self, y: Tensor, shrunk: Tensor, up: UpWeight) -> None:
        """Add scale * `shrunk` B^T to these rows of y, in place. shrunk: [rows, ranks]; y: [tokens, outputs]."""
        target, factor = y[:, up.columns], 1.0
        if isinstance(self.scale, Tensor):
            shrunk = shrunk * self.scale.to(shrunk.dtype)
        else:
            factor = self.scale
        if isinstance(self.rows, slice):
            target[self.rows].addmm_(shrunk, up.weight.t(), alpha=factor)
        else:
            target.index_add_(0, self.rows, shrunk @ up.weight.t(), alpha=factor)

    def _select(self, x: Tensor) -> Tensor:
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)


@dataclass(frozen=True)
class LayerChange:
    """Changes of one layer by all adapters of a step: one product with A and one with B for each adapter and part."""

    parts: Sequence[tuple[ChangedRows, LayerWeights]]

    def add_to(self, y: Tensor, x: Rows) -> Tensor:
        """Add the changes to y in place, and return it. x: [tokens, inputs]; y: [tokens, outputs], W x of this rank.

        A layer whose inputs the ranks share adds before the ranks sum y: each rank has its columns of A, and so its
        summand of B (A x).
        """
        for changed, weights in self.parts:
            shrunk = changed.of(x) @ weights.down.t()
            for up in weights.ups:
                changed.add(y, shrunk[:, up.ranks], up)
        return y


@runtime_checkable
class Adaptable(Protocol):
    """A layer that adds the changes of adapters to its output."""

    weight: torch.nn.Parameter
    change: LayerChange | None
    """Changes while a step with adapters runs; None: the layer computes as if there were no adapters."""
