"""Shift, scale and gate of every block, kept by timestep.

They depend on the timestep alone, and their weights may be a third of the model's: a server that draws one picture
after another with the same schedule computes them once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """Rows for the sequences of one step; one row alone when all sequences are at the same timestep.

    What the parts of a row mean, and which kind of token a stream is, the model knows.
    """

    blocks: Tensor
    """[layers, streams, rows, parts, D]."""
    final: Tensor
    """Of the output layer: [rows, parts, D]."""

    def index(self, sequence: Tensor) -> Tensor | None:
        """int64 [tokens], each token's row, from its sequence; None where all have the only row."""
        return None if self.final.shape[0] == 1 else sequence

    def of_output(self, sequence: Tensor) -> tuple[Tensor, ...]:
        """A tensor a part, [1, D] or [tokens, D]."""
        return per_token(self.final, self.index(sequence))

    def of_members(self, numbers: Sequence[int]) -> Modulation:
        """For some sequences, which keep these numbers; one alone has one row for all its tokens."""
        if len(numbers) > 1 or self.final.shape[0] == 1:
            return self
        (row,) = numbers
        # Laid out as any other single row, which compiled code asks for.
        blocks = self.blocks[:, :, row : row + 1].clone(memory_format=torch.contiguous_format)
        return Modulation(blocks, self.final[row : row + 1])


def per_token(rows: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """rows: [rows, parts, D]; index: see `Modulation.index` -> a tensor a part, [1, D] or [tokens, D]."""
    return (rows if index is None else rows.index_select(0, index)).unbind(1)


Compute = Callable[[Sequence[float]], Modulation]


class ModulationTable:
    """The rows last used, up to `max_bytes`; `compute` makes the rows of some timesteps."""

    def __init__(self, compute: Compute, max_bytes: int) -> None:
        self._compute = compute
        self._max_bytes = max_bytes
        self._rows: OrderedDict[float, Modulation] = OrderedDict()
        self._row_bytes = 0

    def prefetch(self, timesteps: Sequence[float]) -> None:
        """Make the rows of a whole schedule in few large products, where the table can hold them."""
        missing = [t for t in dict.fromkeys(timesteps) if t not in self._rows]
        if not missing:
            return
        self._add(missing[:1])
        if self._row_bytes * len(missing) <= self._max_bytes:
            for start in range(1, len(missing), 64):
                self._add(missing[start : start + 64])

    def rows_of(self, timesteps: Sequence[float]) -> Modulation:
        """The rows of these timesteps, one for each, or a single one when they are all equal."""
        distinct = list(dict.fromkeys(timesteps))
        rows = {t: self._rows[t] for t in distinct if t in self._rows}
        if missing := [t for t in distinct if t not in rows]:
            rows |= self._add(missing)
        for t in distinct:
            if t in self._rows:
                self._rows.move_to_end(t)
        if len(distinct) == 1:
            return rows[distinct[0]]
        return Modulation(
            blocks=torch.cat([rows[t].blocks for t in timesteps], dim=2),
            final=torch.cat([rows[t].final for t in timesteps]),
        )

    def _add(self, timesteps: Sequence[float]) -> dict[float, Modulation]:
        made = self._compute(timesteps)
        # Each row owns its memory, so that dropping one frees it.
        rows = {
            t: Modulation(made.blocks[:, :, i : i + 1].clone(), made.final[i : i + 1].clone())
            for i, t in enumerate(timesteps)
        }
        self._row_bytes = (made.blocks.nbytes + made.final.nbytes) // len(timesteps)
        self._rows |= rows
        while len(self._rows) * self._row_bytes > self._max_bytes:
            self._rows.popitem(last=False)
        return rows

    @property
    def num_bytes(self) -> int:
        return len(self._rows) * self._row_bytes
