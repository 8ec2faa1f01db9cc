"""Section `caches`: Cache-DiT and TeaCache with forced skips, against the same engine without skips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench, Lazy
from benchmarks.gpu.engine import COMPUTED_FIRST, Started, forced_cache, forced_tea_cache, generate_seconds, stages
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.costs import computed_blocks

NAME = "qwen-image"
STEPS = 50
PLAIN_STEPS = 8
"""Steps without a cache; enough to time a computed step."""
WARM_UP_STEPS = COMPUTED_FIRST + 2
"""Warm-up steps, some of which skip."""
KEPT_BLOCKS = {"cache_dit": 1, "tea_cache": 0}
"""Number of blocks that a skipping step computes."""
PLAIN = f"uncached, {PLAIN_STEPS} steps"


@dataclass(frozen=True)
class Cached:
    bench: Bench
    backend: str
    engine: Lazy[Started]

    def draw(self, case: str, steps: int, cache: bool, predicted: float | None = None) -> tuple[Row, dict[str, float]]:
        params = self.bench.params(NAME, self.bench.size(1024), steps, cache=cache)
        omni, prompt = self.engine.get().omni, self.bench.prompt(NAME)
        seconds, timings = generate_seconds(omni, prompt, [params], warm_up_steps=WARM_UP_STEPS)
        detail = {
            **stages(timings),
            "cached steps": timings["cached_steps"],
            "ms a step": 1e3 * timings["denoise"] / steps,
        }
        return Row.milliseconds(case, seconds, predicted, **detail), timings

    def plain(self) -> list[Row]:
        return [self.draw(PLAIN, PLAIN_STEPS, cache=False)[0]]

    def cached(self, case: str) -> list[Row]:
        row, timings = self.draw(case, STEPS, True, self.predicted(STEPS))
        return [row, self._skipping(timings)]

    def predicted(self, steps: int) -> float | None:
        """Predicted milliseconds of a picture; all patterns skip about as much as the forced mask."""
        skipped = forced_cache(steps)["cache_config"]["steps_computation_mask"].count(0) / steps
        blocks = computed_blocks(self.bench.shape(NAME), skipped, KEPT_BLOCKS[self.backend])
        step = self.bench.predict(NAME, [self.bench.size(1024)], blocks=blocks)
        return step and step * steps

    def _skipping(self, timings: dict[str, float]) -> Row:
        """Measure a skipping step: the time of denoising minus that of computed steps without a cache, divided by the
        skips. So it includes the time that the cache adds to computed steps."""
        case, skipped = f"{self.backend}, a skipping step", timings["cached_steps"]
        plain = next((r for r in self.bench.report.rows("caches") if r.case == PLAIN and r.measured), None)
        if plain is None or not skipped:
            return Row(case, refused="the uncached row is missing, or nothing was skipped")
        computed = float(plain.detail["ms a step"])
        left = 1e3 * timings["denoise"] - computed * (STEPS - skipped)
        predicted = self.bench.predict(NAME, [self.bench.size(1024)], blocks=KEPT_BLOCKS[self.backend])
        speed_up = computed * STEPS / (1e3 * timings["denoise"])
        detail = {"a computing step ms": computed, "denoising faster by": speed_up}
        return Row(case, left / skipped, "ms", predicted, detail=detail)


def section_caches(bench: Bench) -> Iterator[Case]:
    settings: dict[str, dict[str, Any]] = {"cache_dit": forced_cache(STEPS), "tea_cache": forced_tea_cache()}
    for backend, forced in settings.items():
        start = partial(Started.of, bench, NAME, distributed_executor_backend="uni", **forced)
        with Lazy(start, Started.close) as engine:
            cached = Cached(bench, backend, engine)
            if backend == "cache_dit":
                yield Case(PLAIN, cached.plain)
            case = f"{backend}, {STEPS} steps"
            yield Case(case, partial(cached.cached, case), cached.predicted(STEPS))
