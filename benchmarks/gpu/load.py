"""Section `load`: several copies of the model against one that all GPUs share, under load; without HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.bench import NEGATIVE, Bench
from benchmarks.gpu.layouts import MODEL, check_devices, name_of
from benchmarks.gpu.report import Case, Row
from benchmarks.workload import Item, Outcome, draw_workload, play, summarise
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import OmniError
from vllm_omni.inputs.data import OmniPrompt

SIDE, NUM_STEPS = 512, 10
PARTS_OF_CAPACITY = (0.25, 0.5, 0.75)
"""Arrival rates, as fractions of the copies' capacity by the roofline, which ignores encode and decode."""
UNKNOWN_CAPACITY = 20.0
"""Capacity in pictures per second where no roofline is known: small shapes on a CPU."""
RATE_SECONDS = 8.0
MIN_REQUESTS = 6


def section_load(bench: Bench) -> Iterator[Case]:
    """Measure both with the same arrivals, at three rates. Prediction of a latency: the steps of a request alone."""
    count = max((DiffusionParallelConfig(**degrees).world_size for degrees in bench.layouts), default=1)
    steps = bench.steps(NUM_STEPS)
    for degrees in contenders(count):
        predicted = bench.predict(MODEL, [bench.size(SIDE)], DiffusionParallelConfig(**degrees))
        run = partial(_run, bench, degrees, count, predicted and predicted * steps)
        yield Case(name_of(degrees), run, predicted and predicted * steps)


def contenders(count: int) -> tuple[dict[str, int], dict[str, int]]:
    """Layouts: one copy on each GPU, and one copy whose guidance branches and tokens are shared by all."""
    ulysses = {"ulysses_degree": count // 2} if count > 2 else {}
    return {"data_parallel_size": count}, {"cfg_parallel_size": 2, **ulysses}


def rates(bench: Bench, count: int) -> list[float]:
    """Arrivals per second."""
    step = bench.predict(MODEL, [bench.size(SIDE)])
    capacity = 1e3 * count / (step * bench.steps(NUM_STEPS)) if step else UNKNOWN_CAPACITY
    return [part * capacity for part in PARTS_OF_CAPACITY]


def _run(bench: Bench, degrees: Mapping[str, int], count: int, predicted: float | None) -> list[Row]:
    check_devices(bench, count)
    if count % 2:
        return [Row(name_of(dict(degrees)), refused=f"takes an even number of GPUs, got {count} by --layouts")]
    return asyncio.run(_rows(bench, degrees, rates(bench, count), predicted))


async def _rows(
    bench: Bench, degrees: Mapping[str, int], arrivals: Sequence[float], predicted: float | None
) -> list[Row]:
    """One row per rate: the median latency, with other numbers as details."""
    parallel = DiffusionParallelConfig(**degrees)
    omni = AsyncOmni(
        model=bench.model(MODEL), load_format="dummy", parallel_config=parallel, enforce_eager=bench.enforce_eager
    )
    size, steps = bench.size(SIDE), bench.steps(NUM_STEPS)
    draw = partial(draw_workload, sizes=[f"{size[1]}x{size[0]}"], steps=[steps])
    rows = []
    try:
        await omni.start()
        send = partial(_send, bench, omni)
        await play(draw(2 * parallel.world_size, rate=None, seed=0), send)  # kernels of these sizes, caches
        for rate in arrivals:
            seconds = RATE_SECONDS / (80 if bench.tiny else 1)
            found = summarise(await play(draw(max(MIN_REQUESTS, round(rate * seconds)), rate=rate, seed=1), send))
            rows.append(_row(f"{name_of(dict(degrees))}, {rate:.3g} a second", found, predicted))
    finally:
        await omni.close()
    return rows


def _row(case: str, found: Mapping[str, Any], predicted: float | None) -> Row:
    if found["num_errors"]:
        return Row(case, refused=f"failed: {found['num_errors']} of {found['num_requests']} requests")
    latency = found["all"]
    detail = {f"{name} ms": 1e3 * latency[name] for name in ("p90", "mean", "queue", "denoise")}
    detail |= {"pictures a second": found["pictures_per_second"], "requests": found["num_requests"]}
    return Row(case, 1e3 * latency["p50"], "ms", predicted, detail=detail)


async def _send(bench: Bench, omni: AsyncOmni, item: Item, start: float) -> Outcome:
    """Send function for the engine in this process, in place of a server."""
    sent = time.perf_counter() - start
    outcome = Outcome(item.index, item.kind, sent, sent)
    params = bench.params(MODEL, bench.size(SIDE), item.steps, seed=item.seed)
    try:
        async for output in omni.generate(OmniPrompt(item.prompt, NEGATIVE), params):
            outcome.timings = output.timings
    except OmniError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.done = time.perf_counter() - start
    return outcome
