"""Placement: choose the rank group that computes each sequence of a step.

A placement may change between two steps, because every rank holds all latents. A step cache loses what it kept for a
sequence that moves, so sequences keep their rank group while that makes the fullest group only a little fuller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Placement = dict[str, list[int]]
"""Request id -> the rank group of each of its branches."""
TOLERANCE = 1.1
"""Tokens of the fullest group, relative to the best balance, up to which sequences keep their groups."""


def balance(
    branch_tokens: Mapping[str, Sequence[int]], num_groups: int, last: Mapping[str, Sequence[int]] | None = None
) -> Placement:
    """Assign sequences to rank groups so that token counts balance: longest first, each to the emptiest group.

    branch_tokens: request id -> tokens of each of its branches. last: placement of the previous step; these sequences
    keep their groups where the fullest group then has at most `TOLERANCE` times the tokens that it needs to have.
    """
    fresh, fullest = _assign(branch_tokens, num_groups, {})
    kept, fullest_kept = _assign(branch_tokens, num_groups, last or {})
    return kept if fullest_kept <= TOLERANCE * fullest else fresh


def _assign(
    branch_tokens: Mapping[str, Sequence[int]], num_groups: int, last: Mapping[str, Sequence[int]]
) -> tuple[Placement, int]:
    """Placement that keeps every group in `last`, and the number of tokens of its fullest group."""
    loads = [0] * num_groups
    placement = {id: list(last[id]) if id in last else [0] * len(tokens) for id, tokens in branch_tokens.items()}
    for id in branch_tokens.keys() & last.keys():
        for group, num_tokens in zip(placement[id], branch_tokens[id], strict=True):
            loads[group] += num_tokens
    new = [(n, id, i) for id, tokens in branch_tokens.items() if id not in last for i, n in enumerate(tokens)]
    for num_tokens, id, branch in sorted(new, key=lambda b: -b[0]):
        group = loads.index(min(loads))
        placement[id][branch] = group
        loads[group] += num_tokens
    return placement, max(loads)
