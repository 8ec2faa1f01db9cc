"""Which rank group computes which sequence of a step. Arithmetic alone.

A placement may change from one step to the next: latents are replicated, so a rank group needs nothing of the one
that computed a sequence before. What a step cache kept of it is lost, though, so sequences stay where they are for as
long as that costs little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Placement = dict[str, list[int]]
"""Request id -> the rank group of each of its guidance branches."""
TOLERANCE = 1.1
"""How much fuller the fullest group may be than it need be, for sequences to stay where they are."""


def balance(
    branch_tokens: Mapping[str, Sequence[int]], num_groups: int, last: Mapping[str, Sequence[int]] | None = None
) -> Placement:
    """Deals sequences to rank groups so that their token counts balance: the longest first, to the emptiest group.

    branch_tokens: request id -> tokens of each of its guidance branches; last: the placement of the step before, whose
    sequences keep their groups where the fullest group is then hardly fuller.
    """
    fresh, fullest = _deal(branch_tokens, num_groups, {})
    kept, fullest_kept = _deal(branch_tokens, num_groups, last or {})
    return kept if fullest_kept <= TOLERANCE * fullest else fresh


def _deal(
    branch_tokens: Mapping[str, Sequence[int]], num_groups: int, last: Mapping[str, Sequence[int]]
) -> tuple[Placement, int]:
    """A placement that keeps what `last` has, and the tokens of its fullest group."""
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
