"""The tree against a sorted list."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import pytest

from tests.operations import counting_operations
from vllm_omni.diffusion.control.queue.work_tree import Key, WorkTree


@dataclass(frozen=True)
class Row:
    key: Key
    value: str
    work: float
    tokens: tuple[float, float]


def make_row(rng: random.Random, number: int) -> Row:
    tokens = (rng.choice([1.0, 5.0, 20.0]), rng.choice([1.0, 5.0, math.inf]))
    return Row((rng.randint(0, 2), rng.uniform(0, 3), number), f"v{number}", rng.uniform(0, 9), tokens)


def add(tree: WorkTree[str], row: Row) -> None:
    tree.add(row.key, row.value, row.work, row.tokens)


@pytest.mark.parametrize("seed", range(10))
def test_it_is_a_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    tree: WorkTree[str] = WorkTree()
    rows: list[Row] = []
    for number in range(200):
        if rows and rng.random() < 0.4:
            gone = rows.pop(rng.randrange(len(rows)))
            tree.remove(gone.key)
        else:
            rows.append(make_row(rng, number))
            add(tree, rows[-1])
        rows.sort(key=lambda row: row.key)
        assert list(tree) == [(row.key, row.value) for row in rows]
        assert len(tree) == len(rows)
        assert tree.work == pytest.approx(sum(row.work for row in rows))
        for key in (rng.choice(rows).key if rows else (0.0,), (1, 1.5, number)):
            assert tree.work_before(key) == pytest.approx(sum(row.work for row in rows if row.key < key))
            for index, limit in ((0, 0.5), (0, 5.0), (1, 1.0), (1, math.inf)):
                fitting = [(row.key, row.value) for row in rows if row.tokens[index] <= limit]
                behind = [pair for pair in fitting if pair[0] > key]
                assert tree.first_after(key, index, limit) == (behind[0] if behind else None)
                assert tree.first_after(None, index, limit) == (fitting[0] if fitting else None)


def test_an_empty_tree_has_no_work_left_over() -> None:
    """Sums are recomputed, so rounding errors do not add up: 0.1 + 0.2 - 0.1 - 0.2 is not 0."""
    tree: WorkTree[str] = WorkTree()
    for number, work in enumerate((0.1, 0.2, 1e9, 0.3)):
        tree.add((float(number),), "", work, (0.0,))
    tree.remove((2.0,))
    assert tree.work == pytest.approx(0.6, abs=1e-12)
    for number in (0, 1, 3):
        tree.remove((float(number),))
    assert tree.work == 0
    with pytest.raises(KeyError):
        tree.remove((0.0,))


CALLS: dict[str, Callable[[WorkTree[int], float], object]] = {
    "add": lambda tree, key: tree.add((key,), 0, 1.0, (key,)),
    "remove": lambda tree, key: tree.remove((key,)),
    "work_before": lambda tree, key: tree.work_before((key,)),
    "first_after": lambda tree, key: tree.first_after((key,), 0, math.inf),
    "first_after without a match": lambda tree, key: tree.first_after((key,), 0, key),
    "the first three": lambda tree, key: list(islice(tree, 3)),
}


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_work_grows_with_the_logarithm(order: str) -> None:
    counts: dict[str, list[int]] = {name: [] for name in CALLS}
    for size in (64, 4096):
        keys = [float(key) for key in range(0, 2 * size, 2)]
        if order == "descending":
            keys.reverse()
        if order == "random":
            random.Random(0).shuffle(keys)
        tree: WorkTree[int] = WorkTree()
        for key in keys:
            tree.add((key,), 0, 1.0, (key,))
        for name, call in CALLS.items():
            with counting_operations() as operations:
                for between in range(1, 2 * size, 2 * size // 16):
                    call(tree, float(between))
            counts[name].append(operations.number)
    for name, (few, many) in counts.items():
        assert 0 < many <= 3 * few, name  # log 4096 is twice log 64; a pass over all would be 64 times as much
