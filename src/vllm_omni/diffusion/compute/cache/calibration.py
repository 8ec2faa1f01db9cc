"""Measure TeaCache's polynomial (arXiv 2411.19108), which maps the signal's change to the output's change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_omni.diffusion.compute.cache.base import Blocks, SequenceStep, SlotContent, StepCache, relative_changes
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden

DEGREE = 4
"""Degree of the polynomial, as in the published code."""


@dataclass(frozen=True)
class Change:
    """Relative change of one sequence since the last step: mean|now - before| / mean|before|."""

    step: int
    signal: float
    output: float


@dataclass(frozen=True)
class Observed(SlotContent):
    signal: Tensor
    output: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.signal, self.output


class ChangeRecorder(StepCache):
    """Computes every block and records how much each step differs from the last one."""

    def __init__(self, rank_group: Group) -> None:
        super().__init__(rank_group)
        self.changes: list[Change] = []

    def _run_blocks(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        lengths = blocks.pack.image.lengths
        output = blocks.run(hidden, range(blocks.num_blocks))
        observed = [
            Observed(signal.clone(), image.clone())
            for signal, image in zip(blocks.signal(hidden).split(lengths), output.image.split(lengths))
        ]
        pairs = [
            (sequence.step, now, sequence.content)
            for sequence, now in zip(sequences, observed)
            if isinstance(sequence.content, Observed)
        ]
        signals = relative_changes([(now.signal, before.signal) for _, now, before in pairs], self._rank_group)
        outputs = relative_changes([(now.output, before.output) for _, now, before in pairs], self._rank_group)
        self.changes += [Change(step, x, y) for (step, _, _), x, y in zip(pairs, signals, outputs)]
        for sequence, now in zip(sequences, observed):
            self._store(sequence, now, skipped=False)
        return output


def fit_polynomial(changes: Sequence[Change]) -> tuple[float, ...]:
    """Least-squares polynomial from the signal's change to the output's change: coefficients, highest power first."""
    fitted = np.polyfit([c.signal for c in changes], [c.output for c in changes], DEGREE)
    return tuple(float(coefficient) for coefficient in fitted)


def root_mean_square_error(coefficients: Sequence[float], changes: Sequence[Change]) -> float:
    """Error of the polynomial's prediction of the outputs' changes."""
    predicted = np.polyval(list(coefficients), [c.signal for c in changes])
    return float(np.sqrt(np.mean((predicted - [c.output for c in changes]) ** 2)))
