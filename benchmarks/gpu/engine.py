"""Sections `end_to_end`, `batching` and `caches`: whole pictures through the engine and its worker process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.costs import computed_blocks
from benchmarks.timing import Spread
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

REPEATS = 2
MIXED_SIZES: tuple[Size, ...] = ((512, 512), (448, 576), (640, 384), (512, 448), (384, 640), (576, 512), (480, 480))
README_CACHE = {"enable_taylorseer": True, "taylorseer_order": 2}
"""The setting that README recommends."""
WARM_UP_STEPS, RUN_OF_SKIPS = 4, 3
"""The forced pattern: as many steps computed first, then so many skipped after each that is computed. It is what the
recommended setting does at most (`max_warmup_steps`, `max_continuous_cached_steps`)."""


def generate_seconds(
    omni: Omni,
    prompt: OmniPrompt,
    params: Sequence[OmniDiffusionSamplingParams],
    repeats: int = REPEATS,
) -> tuple[Spread, dict[str, float]]:
    """Wall-clock of a picture for each of `params`, all at once, and the slowest picture's timings of the last run.

    The first run warms up.
    """
    seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        outputs = omni.generate([prompt] * len(params), [replace(p, seed=repeat) for p in params])
        if repeat:
            seconds.append(time.perf_counter() - start)
    return Spread.of(seconds), max((o.timings for o in outputs), key=lambda timings: timings["total"])


def stages(timings: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each, for a row."""
    return {f"{name} ms": 1e3 * timings[name] for name in ("text_encode", "denoise", "vae_decode")}


def section_end_to_end(bench: Bench) -> Iterator[Case]:
    """1024x1024: Qwen-Image with guidance, 50 steps; Z-Image-Turbo, 9. Predicted is the denoising alone."""
    size = bench.size(1024)
    for name, count in (("qwen-image", 50), ("z-image", 9)):
        steps = bench.steps(count)
        predicted = bench.predict(name, [size])
        with Lazy(lambda name=name: bench.omni(name), Omni.close) as omni:  # type: ignore[misc]  # name

            def run(omni: Any = omni, name: str = name, steps: int = steps, predicted: Any = predicted) -> list[Row]:
                params = bench.params(name, size, steps)
                seconds, timings = generate_seconds(omni.get(), bench.prompt(name), [params])
                row = Row.milliseconds(f"{name}, {steps} steps", seconds, predicted and predicted * steps)
                per_step = 1e3 * timings["denoise"] / steps
                return [replace(row, detail={**row.detail, **stages(timings), "ms a step": per_step})]

            yield Case(f"{name}, {steps} steps", run, predicted and predicted * steps)


def section_batching(bench: Bench) -> Iterator[Case]:
    """Pictures of mixed sizes about 512x512, all at once, against one after another."""
    name, steps = "qwen-image", bench.steps(20)
    with Lazy(lambda: bench.omni(name), Omni.close) as omni:
        for batch in (1, 4, 8, 16):
            sizes = [bench.size(*MIXED_SIZES[i % len(MIXED_SIZES)]) for i in range(batch)]
            predicted = bench.predict(name, sizes)

            def run(batch: int = batch, sizes: list[Size] = sizes, predicted: Any = predicted) -> list[Row]:
                params = [bench.params(name, size, steps) for size in sizes]
                together, _ = generate_seconds(omni.get(), bench.prompt(name), params, repeats=2)
                start = time.perf_counter()
                for p in params:
                    omni.get().generate(bench.prompt(name), p)
                alone = time.perf_counter() - start
                detail = {
                    "pictures a second": batch / together.median,
                    "one by one ms": 1e3 * alone,
                    "gain": alone / together.median,
                }
                return [Row.milliseconds(f"batch {batch}", together, predicted and predicted * steps, **detail)]

            yield Case(f"batch {batch}", run, predicted and predicted * steps)


def forced_mask(steps: int) -> list[int]:
    """By step: 1 computes, 0 skips; the last step computes."""
    cycle = [0] * RUN_OF_SKIPS + [1]
    mask = [1] * WARM_UP_STEPS + [cycle[i % len(cycle)] for i in range(max(0, steps - WARM_UP_STEPS))]
    return [*mask[: steps - 1], 1]


def forced_cache(steps: int) -> dict[str, Any]:
    """Engine settings of the forced pattern: with random weights steps are not alike, and no cache would skip any."""
    return {
        "cache_backend": "cache_dit",
        "cache_config": {
            **README_CACHE,
            "max_warmup_steps": 0,
            "steps_computation_mask": forced_mask(steps),
            "steps_computation_policy": "static",
            "max_continuous_cached_steps": -1,
        },
    }


def section_caches(bench: Bench) -> Iterator[Case]:
    """cache_dit with TaylorSeer of order 2 and a forced pattern of skips, against the same engine without it."""
    name, steps, size = "qwen-image", max(16, bench.steps(50)), bench.size(1024)
    mask = forced_mask(steps)
    skipped = mask.count(0) / steps
    shape = bench.shape(name)
    predictions = {
        cached: bench.predict(name, [size], blocks=computed_blocks(shape, skipped) if cached else None)
        for cached in (False, True)
    }
    with Lazy(lambda: bench.omni(name, **forced_cache(steps)), Omni.close) as omni:
        for cached, predicted in predictions.items():
            case = f"{steps} steps, {'cached' if cached else 'uncached'}"

            def run(case: str = case, cached: bool = cached, predicted: Any = predicted) -> list[Row]:
                params = bench.params(name, size, steps, cache=cached)
                seconds, timings = generate_seconds(omni.get(), bench.prompt(name), [params])
                detail = {
                    "denoise ms": 1e3 * timings["denoise"],
                    "cached steps": timings["cached_steps"],
                    "ms a step": 1e3 * timings["denoise"] / steps,
                }
                rows = [Row.milliseconds(case, seconds, predicted and predicted * steps, **detail)]
                return rows + ([_skipping(bench, timings, steps)] if cached else [])

            yield Case(case, run, predicted and predicted * steps)


def _skipping(bench: Bench, timings: dict[str, float], steps: int) -> Row:
    """A skipping step alone: what is left of the denoising when the computed steps are taken off."""
    case = "a skipping step"
    plain = next((r for r in bench.report.rows("caches") if r.case.endswith("uncached") and r.measured), None)
    cached_steps = timings["cached_steps"]
    if plain is None or not cached_steps:
        return Row(case, refused="the uncached row is missing, or nothing was skipped")
    computed = float(plain.detail["ms a step"])
    left = 1e3 * timings["denoise"] - computed * (steps - cached_steps)
    predicted = bench.predict("qwen-image", [bench.size(1024)], blocks=1)
    return Row(case, left / cached_steps, "ms", predicted, detail={"a computing step ms": computed})
