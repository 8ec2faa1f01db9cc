"""Which rank group computes which sequence of a step. Arithmetic alone.

A placement may change from one step to the next: latents are replicated, so a rank group needs nothing of the one
that computed a sequence before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def balance(branch_tokens: Mapping[str, Sequence[int]], num_groups: int) -> dict[str, list[int]]:
    """Deals sequences to rank groups so that their token counts balance: the longest first, to the emptiest group.

    branch_tokens: request id -> tokens of each of its guidance branches. Returns request id -> a group for each branch.
    """
    loads = [0] * num_groups
    placement = {request_id: [0] * len(tokens) for request_id, tokens in branch_tokens.items()}
    branches = [(n, request_id, i) for request_id, tokens in branch_tokens.items() for i, n in enumerate(tokens)]
    for num_tokens, request_id, branch in sorted(branches, key=lambda b: -b[0]):
        group = loads.index(min(loads))
        placement[request_id][branch] = group
        loads[group] += num_tokens
    return placement
