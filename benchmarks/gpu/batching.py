"""Section `batching`: pictures of mixed sizes at once, against one after another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.engine import Started, generate_seconds
from benchmarks.gpu.report import Case, Row

NAME = "qwen-image"
STEPS, WARM_UP_STEPS = 20, 4
MIXED_SIZES: dict[int, tuple[Size, ...]] = {
    512: ((512, 512), (448, 576), (640, 384), (512, 448), (384, 640), (576, 512), (480, 480)),
    256: ((256, 256), (224, 288), (320, 192), (256, 224), (192, 320), (288, 256), (240, 240)),
}
"""Approximate side in pixels -> sizes of the pictures, used in turn."""
BATCHES = {512: (1, 4, 8, 16), 256: (1, 8, 16)}


def section_batching(bench: Bench) -> Iterator[Case]:
    alone: dict[Size, float] = {}
    with Lazy(partial(Started.of, bench, NAME, distributed_executor_backend="uni"), Started.close) as engine:
        for side, batches in BATCHES.items():
            for batch in batches:
                sizes = [bench.size(*MIXED_SIZES[side][i % len(MIXED_SIZES[side])]) for i in range(batch)]
                step = bench.predict(NAME, sizes)
                case, predicted = f"about {side}x{side}, batch {batch}", step and step * STEPS
                yield Case(case, partial(_together, bench, engine, case, sizes, predicted, alone), predicted)


def _together(
    bench: Bench, engine: Lazy[Started], case: str, sizes: list[Size], predicted: float | None, alone: dict[Size, float]
) -> list[Row]:
    """Time of mixed sizes at once. `alone`: seconds of one picture by size, which this fills in."""
    started = engine.get()
    params = {size: bench.params(NAME, size, STEPS) for size in sizes}
    measure = partial(generate_seconds, started.omni, bench.prompt(NAME), warm_up_steps=WARM_UP_STEPS)
    for size in params.keys() - alone.keys():
        alone[size] = measure([params[size]])[0].median
    together, timings = measure([params[size] for size in sizes])
    one_by_one = sum(alone[size] for size in sizes)
    assert started.omni._async.ready is not None
    detail = {
        "steps": STEPS,
        "denoise ms": 1e3 * timings["denoise"],
        "pictures a second": len(sizes) / together.median,
        "one by one ms": 1e3 * one_by_one,
        "gain": one_by_one / together.median,
        "max_batch_tokens": started.omni._async.ready.max_batch_tokens,
    }
    return [Row.milliseconds(case, together, predicted, **detail)]
