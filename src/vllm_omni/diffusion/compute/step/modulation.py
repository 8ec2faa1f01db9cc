"""Rows of modulation (shift, scale and gate of every block), kept by condition.

A condition is all that a row depends on: the timestep alone, or also a guidance scale or pooled text. The layers that
make rows may hold a third of the model's weights: pictures with the same conditions share the rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """Rows of modulation of one step: one a sequence, or a single row when all sequences have the same condition.

    The family defines the parts of a row, and the streams (kinds of tokens).
    """

    blocks: Tensor
    """[layers, streams, rows, parts, D]; one layer alone where all blocks share their modulation."""
    final: Tensor
    """[rows, parts, D], for the output layer."""

    def index(self, sequence: Tensor) -> Tensor | None:
        """int64 [tokens]: row of each token. sequence: int64 [tokens]. None: there is a single row for all."""
        return None if self.final.shape[0] == 1 else sequence

    def of_output(self, sequence: Tensor) -> tuple[Tensor, ...]:
        """Parts of the output layer's rows, each [1, D] or [tokens, D]."""
        return per_token(self.final, self.index(sequence))

    def of_members(self, numbers: Sequence[int]) -> Modulation:
        """Rows for the sequences with these numbers; a sequence alone gets a modulation of one row."""
        if len(numbers) > 1 or self.final.shape[0] == 1:
            return self
        (row,) = numbers
        # Contiguous like every single row: compiled code depends on the strides.
        blocks = self.blocks[:, :, row : row + 1].clone(memory_format=torch.contiguous_format)
        return Modulation(blocks, self.final[row : row + 1])


def per_token(rows: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """Parts of the rows, each [1, D] or [tokens, D]. rows: [rows, parts, D]; index: from `Modulation.index`."""
    return (rows if index is None else rows.index_select(0, index)).unbind(1)


Condition = TypeVar("Condition", bound=Hashable)


class ModulationTable(Generic[Condition]):
    """Most recently used rows by condition, up to `max_bytes`."""

    def __init__(self, compute: Callable[[Sequence[Condition]], Modulation], max_bytes: int) -> None:
        """compute: makes the rows of some conditions."""
        self._compute = compute
        self._max_bytes = max_bytes
        self._rows: OrderedDict[Condition, Modulation] = OrderedDict()
        self._row_bytes = 0

    def prefetch(self, conditions: Sequence[Condition]) -> None:
        """Compute the rows of a whole schedule in a few large matrix products, if the table can hold them."""
        missing = [c for c in dict.fromkeys(conditions) if c not in self._rows]
        if not missing:
            return
        first = 0
        if not self._row_bytes:
            self._add(missing[:1])
            first = 1
        # Each call reads the weights of all layers, which may have to be copied to the device.
        if self._row_bytes * len(missing) <= self._max_bytes:
            for start in range(first, len(missing), 64):
                self._add(missing[start : start + 64])

    def rows_of(self, conditions: Sequence[Condition]) -> Modulation:
        """Rows of these conditions, one for each; a single row when all conditions are equal."""
        distinct = list(dict.fromkeys(conditions))
        rows = {c: self._rows[c] for c in distinct if c in self._rows}
        if missing := [c for c in distinct if c not in rows]:
            rows |= self._add(missing)
        for c in distinct:
            if c in self._rows:
                self._rows.move_to_end(c)
        if len(distinct) == 1:
            return rows[distinct[0]]
        return Modulation(
            blocks=torch.cat([rows[c].blocks for c in conditions], dim=2),
            final=torch.cat([rows[c].final for c in conditions]),
        )

    def forget(self, is_forgotten: Callable[[Condition], bool]) -> None:
        """Drop the rows of these conditions."""
        for condition in [c for c in self._rows if is_forgotten(c)]:
            del self._rows[condition]

    def _add(self, conditions: Sequence[Condition]) -> dict[Condition, Modulation]:
        made = self._compute(conditions)
        # Each row owns its memory, so that dropping a row frees it.
        rows = {
            c: Modulation(made.blocks[:, :, i : i + 1].clone(), made.final[i : i + 1].clone())
            for i, c in enumerate(conditions)
        }
        self._row_bytes = (made.blocks.nbytes + made.final.nbytes) // len(conditions)
        self._rows |= rows
        while len(self._rows) * self._row_bytes > self._max_bytes:
            self._rows.popitem(last=False)
        return rows

    @property
    def num_bytes(self) -> int:
        return len(self._rows) * self._row_bytes
