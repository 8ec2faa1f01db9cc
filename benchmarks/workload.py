"""Workload: requests that arrive over time, their outcomes for clients, and a summary."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PROMPTS = (
    "red apple",
    "a panda on a pink background",
    "pizza",
    "rocket",
    "sunflower",
    "a hamburger on a blue background",
)
STAGES = ("queue", "text_encode", "denoise", "vae_decode", "total")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Item:
    """One request of the workload; `arrival` in seconds from the start (open loop only)."""

    index: int
    prompt: str
    size: str
    steps: int
    seed: int
    arrival: float

    @property
    def kind(self) -> str:
        return f"{self.size} x {self.steps} steps"


@dataclass
class Outcome:
    """Record of one request as its client saw it; times in seconds, `sent` and `done` from the start of the run."""

    index: int
    kind: str
    sent: float
    done: float
    error: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def latency(self) -> float:
        return self.done - self.sent


Send = Callable[[Item, float], Awaitable[Outcome]]
"""Function that sends a request and waits for its response; its second argument is `perf_counter()` at the start."""


def draw_workload(
    num_requests: int, sizes: Sequence[str], steps: Sequence[int], rate: float | None, seed: int
) -> list[Item]:
    """Draw requests from a seed. `rate`: Poisson arrivals per second; None: all at once."""
    rng = random.Random(seed)
    arrival, items = 0.0, []
    for index in range(num_requests):
        size, count = rng.choice(sizes), rng.choice(steps)
        items.append(Item(index, rng.choice(PROMPTS), size, count, rng.randrange(2**31), arrival))
        if rate:
            arrival += rng.expovariate(rate)
    return items


async def play(
    items: Sequence[Item], send: Send, concurrency: int | None = None, on_done: Callable[[], object] = lambda: None
) -> list[Outcome]:
    """Send each request at its time, or when one of `concurrency` clients is free."""
    start = time.perf_counter()
    clients = asyncio.Semaphore(concurrency or len(items))

    async def one(item: Item) -> Outcome:
        await asyncio.sleep(max(0.0, item.arrival - (time.perf_counter() - start)))
        async with clients:
            outcome = await send(item, start)
        on_done()
        return outcome

    return list(await asyncio.gather(*map(one, items)))


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput, latency percentiles over all and by kind, mean seconds by stage."""
    good = [o for o in outcomes if o.error is None]
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in good:
        kinds[outcome.kind].append(outcome)
    span = max((o.done for o in outcomes), default=0.0)
    return {
        "num_requests": len(outcomes),
        "num_errors": len(outcomes) - len(good),
        "seconds": span,
        "pictures_per_second": len(good) / span if span else 0.0,
        "all": describe(good),
        "kinds": {kind: describe(of_kind) for kind, of_kind in sorted(kinds.items())},
    }


def describe(outcomes: Sequence[Outcome]) -> dict[str, float]:
    if not outcomes:
        return {"count": 0}
    latencies = [o.latency for o in outcomes]
    row: dict[str, float] = {"count": len(outcomes), "mean": float(np.mean(latencies))}
    row.update({f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES})
    row.update({stage: float(np.mean([o.timings.get(stage, 0.0) for o in outcomes])) for stage in STAGES})
    return row
