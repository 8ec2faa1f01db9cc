"""Low-rank changes of linear layers for some of their rows: `y[rows] += scale * B (A x[rows])`. Nothing is merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.layers.rounding import Rows


@dataclass(frozen=True)
class UpWeight:
    """B of one part of a layer: a layer may hold several layers of the checkpoint, whose outputs lie side by side."""

    columns: slice
    """Outputs of the part on this rank."""
    ranks: slice
    """Rows of `LayerWeights.down` that belong to the part."""
    weight: Tensor
    """[columns, ranks], contiguous."""


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one adapter for one layer, on this rank, in the dtype of the layer's inputs."""

    down: Tensor
    """A of all parts: [ranks of all parts, inputs], contiguous."""
    ups: tuple[UpWeight, ...]

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + sum(up.weight.nbytes for up in self.ups)

    @cached_property
    def addresses(self) -> tuple[int, dict[int, int]]:
        """Address of A, and the address of each B by its first output. Valid while this object lives."""
        found = self.down.data_ptr(), {up.columns.start: up.weight.data_ptr() for up in self.ups}
        assert all(weight.is_contiguous() for weight in (self.down, *(up.weight for up in self.ups)))
        return found

    def to(self, device: torch.device) -> LayerWeights:
        """The same weights on a device."""
        ups = tuple(replace(up, weight=up.weight.to(device)) for up in self.ups)
        return LayerWeights(self.down.to(device), ups)


class RowRange(NamedTuple):
    """Rows of one sequence in a layer's input, and the scale of an adapter for them."""

    start: int
    stop: int
    scale: float


@dataclass(frozen=True)
class AdaptedLayer:
    """Changes of one layer in a pack."""

    parts: Sequence[tuple[LayerWeights, tuple[RowRange, ...]]]
    """Weights of each adapter with the sequences that have it, in the order of the rows."""
    num_rows: int
    """Rows of the layer's input."""
    num_outputs: int
    """Outputs of the layer on this rank."""
    gaps: tuple[tuple[int, int], ...] = ()
    """First rows and ends of rows whose outputs nobody reads."""


class LayerChange(ABC):
    """Changes of one layer by all adapters of a step."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b with the changes: [tokens, inputs] -> [tokens, outputs]."""
        return self.add_to(F.linear(x, weight, bias), x)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """GELU, approximated with tanh, of `linear`; None: not computed together here."""
        return None

    @abstractmethod
    def add_to(self, y: Tensor, x: Rows) -> Tensor:
        """Add the changes to y in place, and return it. x: [tokens, inputs]; y: [tokens, outputs], W x of this rank.

        A layer whose inputs the ranks share adds before the ranks sum y: each rank has its columns of A, and so its
        summand of B (A x).
        """


@dataclass(frozen=True)
class ChangedRows:
    """Rows of a layer's input that one adapter changes."""

    rows: slice | Tensor
    """A range, or int64 [rows], the positions."""
    scale: float | Tensor
    """One for all rows, or float32 [rows, 1]."""

    @classmethod
    def of(cls, ranges: Sequence[RowRange], device: torch.device) -> Self:
        """Rows of these sequences; a range where they are neighbours."""
        lengths = torch.tensor([its.stop - its.start for its in ranges])
        scale: float | Tensor = ranges[0].scale
        if any(its.scale != scale for its in ranges):
            scales = torch.tensor([its.scale for its in ranges])
            scale = to_device(torch.repeat_interleave(scales, lengths)[:, None], device)
        if all(first.stop == second.start for first, second in pairwise(ranges)):
            return cls(slice(ranges[0].start, ranges[-1].stop), scale)
        positions = torch.cat([torch.arange(its.start, its.stop) for its in ranges])
        return cls(to_device(positions, device), scale)

    def select(self, x: Rows) -> Tensor:
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
class TorchChange(LayerChange):
    """`LayerChange` in PyTorch: one product with A and one with B for each adapter and part."""

    parts: Sequence[tuple[ChangedRows, LayerWeights]]

    def add_to(self, y: Tensor, x: Rows) -> Tensor:
        for changed, weights in self.parts:
            shrunk = changed.select(x) @ weights.down.t()
            for up in weights.ups:
                changed.add(y, shrunk[:, up.ranks], up)
        return y


def torch_changes(layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
    """Changes of all layers of a pack, in PyTorch."""
    made: dict[tuple[RowRange, ...], ChangedRows] = {}

    def rows(ranges: tuple[RowRange, ...]) -> ChangedRows:
        if ranges not in made:
            made[ranges] = ChangedRows.of(ranges, device)
        return made[ranges]

    return [TorchChange([(rows(ranges), weights) for weights, ranges in layer.parts]) for layer in layers]


class Adaptable(nn.Module):
    """A layer that adds the changes of adapters to its output.

    No protocol: from Python 3.12 on, `isinstance` with a protocol does not find the parameters of a module.
    """

    weight: Tensor
    change: LayerChange | None = None
    """Changes while a step with adapters runs; None: the layer computes as if there were no adapters."""
