"""Sequences are dealt evenly to rank groups, and stay where they are for as long as that costs little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.diffusion.messages.placement import balance

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=2)


def loads(branch_tokens: dict[str, list[int]], placement: dict[str, list[int]], num_groups: int) -> list[int]:
    totals = [0] * num_groups
    for id, tokens in branch_tokens.items():
        for group, n in zip(placement[id], tokens, strict=True):
            totals[group] += n
    return totals


def test_the_longest_first_to_the_emptiest_group() -> None:
    tokens = {"a": [100, 90], "b": [50], "c": [40]}
    placement = balance(tokens, 2)
    assert placement == {"a": [0, 1], "b": [1], "c": [0]}
    assert loads(tokens, placement, 2) == [140, 140]


def test_who_was_there_stays_when_others_come_and_go() -> None:
    alone = balance({"a": [100, 100]}, 2)
    tokens = {"b": [120, 120], "a": [100, 100]}
    assert balance(tokens, 2)["a"] == [0, 1]
    swapped = {"a": [1, 0]}
    assert balance(tokens, 2, swapped)["a"] == [1, 0]
    assert balance({"a": [100, 100]}, 2, alone) == alone


def test_not_at_the_price_of_an_idle_group() -> None:
    # Four that were dealt evenly to two groups; those of the second have ended.
    tokens = {"a": [100], "b": [100]}
    assert sorted(balance(tokens, 2, {"a": [0], "b": [0]}).values()) == [[0], [1]]


@pytest.mark.parametrize(("fullest", "stay"), [(109, True), (112, False)])
def test_sequences_stay_where_that_makes_no_step_a_tenth_longer(fullest: int, stay: bool) -> None:
    tokens = {"a": [fullest - 50], "b": [50], "c": [50], "d": [150 - fullest]}
    last = {"a": [0], "b": [0], "c": [1], "d": [1]}
    assert max(loads(tokens, last, 2)) == fullest
    placement = balance(tokens, 2, last)
    assert max(loads(tokens, placement, 2)) == (fullest if stay else 100)
    assert (placement == last) == stay


@given(st.dictionaries(st.sampled_from("abcdefgh"), LENGTHS, min_size=1), st.integers(1, 4), st.data())
def test_the_fullest_group_is_hardly_fuller_than_it_need_be(
    tokens: dict[str, list[int]], num_groups: int, data: st.DataObject
) -> None:
    group = st.integers(0, num_groups - 1)
    last = {id: data.draw(st.lists(group, min_size=len(n), max_size=len(n))) for id, n in tokens.items() if id < "e"}
    placement = balance(tokens, num_groups, last)
    assert {id: len(groups) for id, groups in placement.items()} == {id: len(n) for id, n in tokens.items()}
    fresh = max(loads(tokens, balance(tokens, num_groups), num_groups))
    assert max(loads(tokens, placement, num_groups)) <= 1.1 * fresh
