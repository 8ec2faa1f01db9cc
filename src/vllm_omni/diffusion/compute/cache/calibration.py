"""Measure TeaCache's polynomial (arXiv 2411.19108): from the change of the signal to that of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_omni.diffusion.compute.cache.base import Blocks, Kept, SequenceStep, StepCache, relative_changes
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden

DEGREE = 4


@dataclass(frozen=True)
class Change:
    """Of one sequence from one step to the next, relative: mean|now - before| / mean|before|."""

    step: int
    signal: float
    output: float


@dataclass(frozen=True)
class Observed(Kept):
    signal: Tensor
    output: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.signal, self.output


class ChangeRecorder(StepCache):
    """Computes every block, and notes how much each step differs from the one before."""

    def __init__(self, rank_group: Group) -> None:
        super().__init__(rank_group)
        self.changes: list[Change] = []

    def run(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        lengths = blocks.pack.image.lengths
        left = blocks.run(hidden, range(blocks.num_blocks))
        now = [
            Observed(signal.clone(), output.clone())
            for signal, output in zip(blocks.signal(hidden).split(lengths), left.image.split(lengths))
        ]
        pairs = [(sequence, sequence.kept, seen) for sequence, seen in zip(sequences, now)]
        old = [(sequence, kept, seen) for sequence, kept, seen in pairs if isinstance(kept, Observed)]
        signals = relative_changes([(seen.signal, kept.signal) for _, kept, seen in old], self._rank_group)
        outputs = relative_changes([(seen.output, kept.output) for _, kept, seen in old], self._rank_group)
        self.changes += [Change(s.step, x, y) for (s, _, _), x, y in zip(old, signals, outputs)]
        for sequence, seen in zip(sequences, now):
            self._keep(sequence, seen, skipped=False)
        return left


def fit_polynomial(changes: Sequence[Change]) -> tuple[float, ...]:
    """Coefficients, highest power first, of the least-squares fit of the outputs' changes."""
    fitted = np.polyfit([c.signal for c in changes], [c.output for c in changes], DEGREE)
    return tuple(float(coefficient) for coefficient in fitted)


def root_mean_square_error(coefficients: Sequence[float], changes: Sequence[Change]) -> float:
    predicted = np.polyval(list(coefficients), [c.signal for c in changes])
    return float(np.sqrt(np.mean((predicted - [c.output for c in changes]) ** 2)))
