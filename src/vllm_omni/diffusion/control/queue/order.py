"""Entries with work to plan, in the order of a policy."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm_omni.diffusion.control.queue.entries import Entry, Order, Phase
from vllm_omni.diffusion.control.queue.work_tree import WorkTree


class EntryOrder:
    """Entries by priority, then by the policy, then by arrival.

    A place in this order changes only when an entry is planned. So the entries of the last plan, which change with
    every plan and are few, are sorted when they are asked for. All others stay in trees, and no call takes time
    that grows faster than the logarithm of their number.
    """

    def __init__(self, policy_order: Callable[[Entry], Order]) -> None:
        self._policy_order = policy_order
        self._active: dict[int, Entry] = {}
        """Entries of the last plan, by their number."""
        self._paused: WorkTree[Entry] = WorkTree()
        """Begun, and not in the last plan."""
        self._waiting: WorkTree[Entry] = WorkTree()
        """Not begun."""

    def __len__(self) -> int:
        return self.num_begun + self.num_waiting

    def __iter__(self) -> Iterator[Entry]:
        """All in order; the first of them come without a look at the others."""
        for _, entry in heapq.merge(self._sorted_active(), self._paused, self._waiting):
            yield entry

    @property
    def num_begun(self) -> int:
        return len(self._active) + len(self._paused)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def work(self) -> float:
        """Units that remain of all entries."""
        active = sum(entry.remaining for entry in self._active.values())
        return active + self._paused.work + self._waiting.work

    def work_up_to(self, key: Order) -> float:
        """Units that remain of the entries that do not come after `key`."""
        active = sum(entry.remaining for entry in self._active.values() if self.key(entry) <= key)
        behind = (*key, 0.0)  # after `key` and before any other
        return active + self._paused.work_before(behind) + self._waiting.work_before(behind)

    def key(self, entry: Entry) -> Order:
        return (entry.request.priority, *self._policy_order(entry), entry.number)

    def add(self, entry: Entry) -> None:
        tokens = tuple(entry.tokens_to_join(lead) for lead in Phase)
        self._tree_of(entry).add(self.key(entry), entry, entry.remaining, tokens)

    def remove(self, entry: Entry) -> None:
        """Comes before any change to what `key` depends on. An entry without work to plan is not here."""
        if self._active.pop(entry.number, None) is None and not entry.decoded:
            self._tree_of(entry).remove(self.key(entry))

    def set_active(self, entries: Iterable[Entry]) -> None:
        """These are removed, were planned since, and take the place of the last plan's entries."""
        left_out, self._active = self._active, {entry.number: entry for entry in entries if not entry.decoded}
        for entry in left_out.values():
            self.add(entry)

    def candidates(self, begun_only: bool) -> Candidates:
        trees = (self._paused,) if begun_only else (self._paused, self._waiting)
        return Candidates(self._sorted_active(), trees)

    def _tree_of(self, entry: Entry) -> WorkTree[Entry]:
        return self._paused if entry.encoded else self._waiting

    def _sorted_active(self) -> list[tuple[Order, Entry]]:
        return sorted((self.key(entry), entry) for entry in self._active.values())


class Candidates:
    """One pass over entries in order, for one plan; the order does not change meanwhile."""

    def __init__(self, active: Sequence[tuple[Order, Entry]], trees: Sequence[WorkTree[Entry]]) -> None:
        self._active = active
        # Most often all active entries come first: then the trees are not searched.
        self._trees = [(first[0], tree) for tree in trees if (first := next(iter(tree), None))]
        self._last: Order | None = None

    def next(self, lead: Phase, limit: float) -> Entry | None:
        """The next entry that may join a step led by `lead` with at most `limit` tokens; skips those that may not."""
        self._active = [pair for pair in self._active if self._last is None or pair[0] > self._last]
        found = next((pair for pair in self._active if pair[1].tokens_to_join(lead) <= limit), None)
        for first_key, tree in self._trees:
            if found is None or first_key < found[0]:
                other = tree.first_after(self._last, lead, limit)
                found = other if found is None else found if other is None else min(found, other)
        if found is None:
            return None
        self._last, entry = found
        return entry
