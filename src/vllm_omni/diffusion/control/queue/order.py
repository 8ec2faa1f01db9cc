"""Entries that still have items to plan, in the order of a policy."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm_omni.diffusion.control.queue.entries import Entry, Order, Phase
from vllm_omni.diffusion.control.queue.work_tree import WorkTree


class EntryOrder:
    """Entries sorted by priority, then by the policy, then by arrival.

    The sort key of an entry changes only when an item of it is planned. The few entries of the last plan are sorted at
    each call. All others stay in trees, so the time of a call grows at most with the logarithm of their number.
    """

    def __init__(self, policy_order: Callable[[Entry], Order]) -> None:
        self._policy_order = policy_order
        self._active: dict[int, Entry] = {}
        """Entries of the last plan, by their number."""
        self._paused: WorkTree[Entry] = WorkTree()
        """Entries that have begun and are not in the last plan."""
        self._waiting: WorkTree[Entry] = WorkTree()
        """Entries that have not begun."""

    def __len__(self) -> int:
        return self.num_begun + self.num_waiting

    def __iter__(self) -> Iterator[Entry]:
        """Iterate in order, without visiting later entries."""
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
        """Remaining units of all entries."""
        active = sum(entry.remaining for entry in self._active.values())
        return active + self._paused.work + self._waiting.work

    def work_up_to(self, key: Order) -> float:
        """Remaining units of the entries up to and including `key`."""
        active = sum(entry.remaining for entry in self._active.values() if self.key(entry) <= key)
        behind = (*key, 0.0)  # sorts directly after `key`
        return active + self._paused.work_before(behind) + self._waiting.work_before(behind)

    def key(self, entry: Entry) -> Order:
        """Sort key of `entry`; unique."""
        return (entry.request.priority, *self._policy_order(entry), entry.number)

    def add(self, entry: Entry) -> None:
        """Add an entry that is not in the last plan."""
        tokens = tuple(entry.tokens_to_join(lead) for lead in Phase)
        self._tree_of(entry).add(self.key(entry), entry, entry.remaining, tokens)

    def remove(self, entry: Entry) -> None:
        """Remove an entry, before anything that its key depends on changes. Without items to plan it is not here."""
        if self._active.pop(entry.number, None) is None and not entry.decoded:
            self._tree_of(entry).remove(self.key(entry))

    def set_active(self, entries: Iterable[Entry]) -> None:
        """Add the entries of a new plan, which were removed; the previous plan's entries move into the trees."""
        left_out, self._active = self._active, {entry.number: entry for entry in entries if not entry.decoded}
        for entry in left_out.values():
            self.add(entry)

    def candidates(self, begun_only: bool) -> Candidates:
        """Begin a search for the entries of the next plan."""
        trees = (self._paused,) if begun_only else (self._paused, self._waiting)
        return Candidates(self._sorted_active(), trees)

    def _tree_of(self, entry: Entry) -> WorkTree[Entry]:
        return self._paused if entry.begun else self._waiting

    def _sorted_active(self) -> list[tuple[Order, Entry]]:
        return sorted((self.key(entry), entry) for entry in self._active.values())


class Candidates:
    """One pass over the entries in order, for one plan. The order must not change meanwhile."""

    def __init__(self, active: Sequence[tuple[Order, Entry]], trees: Sequence[WorkTree[Entry]]) -> None:
        self._active = active
        # Usually all active entries come first, and the trees need not be searched.
        self._trees = [(first[0], tree) for tree in trees if (first := next(iter(tree), None))]
        self._last: Order | None = None

    def next(self, lead: Phase, limit: float) -> Entry | None:
        """Next entry that may join a step led by `lead` with at most `limit` tokens; None when there is none."""
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
