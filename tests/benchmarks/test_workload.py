"""Arrivals over time, with a sender that answers at once."""

from __future__ import annotations

import asyncio

import pytest
from benchmarks.workload import Item, Outcome, draw_workload, play, summarise


def test_the_same_seed_draws_the_same_requests() -> None:
    first, again = (draw_workload(20, ["64x64", "96x64"], [4, 8], rate=5.0, seed=3) for _ in range(2))
    assert first == again
    assert [item.arrival for item in first] == sorted(item.arrival for item in first)
    assert {item.size for item in first} == {"64x64", "96x64"}
    assert all(item.arrival == 0 for item in draw_workload(4, ["64x64"], [4], rate=None, seed=0))


async def test_no_more_are_sent_at_once_than_there_are_clients() -> None:
    under_way, most = [0], [0]

    async def send(item: Item, start: float) -> Outcome:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0)
        under_way[0] -= 1
        return Outcome(item.index, item.kind, 0.0, 1.0 + item.index, None if item.index else "refused")

    items = draw_workload(6, ["64x64"], [4], rate=None, seed=0)
    done: list[None] = []
    outcomes = await play(items, send, concurrency=2, on_done=lambda: done.append(None))
    assert most == [2]
    assert len(done) == len(outcomes) == 6
    found = summarise(outcomes)
    assert (found["num_errors"], found["all"]["count"], found["seconds"]) == (1, 5, 6.0)
    assert found["all"]["p50"] == pytest.approx(4.0)
