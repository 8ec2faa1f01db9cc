"""Sorted values with sums of their work. Every operation visits O(log n) of n nodes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
Key = tuple[float, ...]


@dataclass(slots=True)
class _Node(Generic[Value]):
    key: Key
    value: Value
    work: float
    tokens: tuple[float, ...]
    rank: float
    left: _Node[Value] | None = None
    right: _Node[Value] | None = None
    size: int = 1
    total_work: float = 0.0
    """Units of this subtree."""
    least_tokens: tuple[float, ...] = ()
    """Smallest of each of the `tokens` of this subtree."""

    def refreshed(self) -> _Node[Value]:
        """Recompute the sums of this subtree: differences would add up rounding errors. Returns this node."""
        self.size, self.total_work, self.least_tokens = 1, self.work, self.tokens
        for child in (self.left, self.right):
            if child is not None:
                self.size += child.size
                self.total_work += child.total_work
                self.least_tokens = tuple(map(min, self.least_tokens, child.least_tokens))
        return self


class WorkTree(Generic[Value]):
    """Treap: a search tree by key and a heap by a random rank, with a depth near 2 ln n.

    Each value has units of work, which are summed, and a tuple of token numbers, by which `first_after` searches.
    """

    def __init__(self) -> None:
        self._root: _Node[Value] | None = None
        self._random = random.Random(0)

    def __len__(self) -> int:
        return 0 if self._root is None else self._root.size

    def __iter__(self) -> Iterator[tuple[Key, Value]]:
        """Iterate in order, without visiting later nodes."""
        path: list[_Node[Value]] = []
        node = self._root
        while path or node is not None:
            while node is not None:
                path.append(node)
                node = node.left
            node = path.pop()
            yield node.key, node.value
            node = node.right

    @property
    def work(self) -> float:
        """Units of all values."""
        return 0.0 if self._root is None else self._root.total_work

    def add(self, key: Key, value: Value, work: float, tokens: tuple[float, ...]) -> None:
        """Add a value. `key` must be unique."""
        node = _Node(key, value, work, tokens, self._random.random())
        smaller, larger = _split(self._root, key)
        self._root = _merge(_merge(smaller, node.refreshed()), larger)

    def remove(self, key: Key) -> None:
        """Remove the value with this key. Raises KeyError when there is none."""
        smaller, others = _split(self._root, key)
        found, larger = _split(others, (*key, 0.0))  # sorts directly after `key`
        self._root = _merge(smaller, larger)
        if found is None:
            raise KeyError(key)

    def work_before(self, key: Key) -> float:
        """Units of all values with smaller keys."""
        work, node = 0.0, self._root
        while node is not None:
            if node.key < key:
                work += node.work + (0.0 if node.left is None else node.left.total_work)
                node = node.right
            else:
                node = node.left
        return work

    def first_after(self, key: Key | None, index: int, limit: float) -> tuple[Key, Value] | None:
        """First value after `key` (None: from the start) whose `tokens[index]` is at most `limit`."""
        found = _first_after(self._root, key, index, limit)
        return None if found is None else (found.key, found.value)


def _split(node: _Node[Value] | None, key: Key) -> tuple[_Node[Value] | None, _Node[Value] | None]:
    """Split into the subtree of keys smaller than `key`, and that of the others."""
    if node is None:
        return None, None
    if node.key < key:
        node.right, larger = _split(node.right, key)
        return node.refreshed(), larger
    smaller, node.left = _split(node.left, key)
    return smaller, node.refreshed()


def _merge(smaller: _Node[Value] | None, larger: _Node[Value] | None) -> _Node[Value] | None:
    """Merge two trees; every key of the first is smaller than every key of the second."""
    if smaller is None or larger is None:
        return larger if smaller is None else smaller
    if smaller.rank > larger.rank:
        smaller.right = _merge(smaller.right, larger)
        return smaller.refreshed()
    larger.left = _merge(smaller, larger.left)
    return larger.refreshed()


def _first_after(node: _Node[Value] | None, key: Key | None, index: int, limit: float) -> _Node[Value] | None:
    """Search one path to `key` and one to the match; subtrees without a match are skipped."""
    if node is None or node.least_tokens[index] > limit:
        return None
    if key is not None and node.key <= key:
        return _first_after(node.right, key, index, limit)
    if (found := _first_after(node.left, key, index, limit)) is not None:
        return found
    return node if node.tokens[index] <= limit else _first_after(node.right, None, index, limit)
