"""Masks of the steps that must be computed, by policy and number of steps (as in cache-dit, after LeMiCa).

A policy alternates runs of computed steps with runs of steps that may be reused. It is defined for 28 steps. More steps
stretch the runs in proportion, fewer steps cut them, and the few steps of a distilled model have their own tables.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain, zip_longest

Runs = tuple[tuple[int, ...], tuple[int, ...]]
"""Lengths of the computed runs, and of the run that may be reused behind each."""

_STEPS = 28
_RUNS: dict[str, Runs] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_FEW_STEPS_RUNS: dict[str, Runs] = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
}
_EXACT_RUNS: dict[int, dict[str, Runs]] = {
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    8: {
        "slow": ((5, 1, 1), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
    6: dict.fromkeys(_RUNS, ((3, 1), (2,))),
    4: dict.fromkeys(_RUNS, ((2, 1), (1,))),
}
_LEAST_STEPS = 8


@lru_cache(maxsize=256)
def steps_mask(policy: str, num_steps: int) -> tuple[int, ...]:
    """Mask with one entry a step: 1 must be computed, 0 may be reused. The last step is computed.

    policy: a key of the tables above. Below 8 steps, policies exist for 4 and 6 only: other numbers compute every step.
    """
    if num_steps < _LEAST_STEPS and num_steps not in _EXACT_RUNS:
        return (1,) * num_steps
    if num_steps in _EXACT_RUNS:
        runs = _EXACT_RUNS[num_steps][policy]
    elif num_steps < 16:
        runs = _FEW_STEPS_RUNS[policy]
    else:
        runs = _stretched(*_RUNS[policy], num_steps) if num_steps > _STEPS else _RUNS[policy]
    compute, reuse = _shortened(*runs, num_steps)
    both = chain.from_iterable(zip_longest(compute, reuse, fillvalue=0))
    mask = list(chain.from_iterable([1 - i % 2] * length for i, length in enumerate(both)))[:num_steps]
    return (*mask[:-1], 1)


def _stretched(compute: tuple[int, ...], reuse: tuple[int, ...], num_steps: int) -> Runs:
    """Runs that cover `num_steps` steps: each in turn grows by half of its share, until their sum is enough."""
    grown = [list(compute), list(reuse)]
    share = num_steps / _STEPS * 0.5
    while True:
        for i, growth in enumerate(zip(compute, reuse)):
            for runs, length in zip(grown, growth):
                runs[i] += max(int(length * share), 1)
                if sum(map(sum, grown)) >= num_steps:
                    return tuple(grown[0]), tuple(grown[1])
        grown[0][-1] += 1
        if sum(map(sum, grown)) >= num_steps:
            return tuple(grown[0]), tuple(grown[1])


def _shortened(compute: tuple[int, ...], reuse: tuple[int, ...], num_steps: int) -> Runs:
    """Runs of at most `num_steps` steps: the last reused and the last computed run lose a step in turn."""
    left = [list(reuse), list(compute)]
    turn = 0
    while sum(map(sum, left)) > num_steps:
        if runs := left[turn % 2]:
            runs[-1] -= 1
            if runs[-1] == 0:
                runs.pop()
        turn += 1
    return tuple(left[1]), tuple(left[0])
