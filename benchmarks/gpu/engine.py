"""Section `end_to_end`: whole pictures through the engine; and functions for other sections with engines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from benchmarks.gpu.bench import Bench, Lazy
from benchmarks.gpu.report import Case, Row
from benchmarks.timing import Spread
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

PICTURES = (("qwen-image", 50, 1), ("z-image", 9, 3))
"""(model, steps, repeats) of each case."""
WARM_UP_STEPS = 4
"""Steps of the warm-up picture."""
README_CACHE = {"enable_taylorseer": True, "taylorseer_order": 2}
"""Setting of Cache-DiT that docs/caches.md recommends."""
COMPUTED_FIRST, RUN_OF_SKIPS = 4, 3
"""Forced pattern: number of steps computed first, then number of skipped steps before each computed one. It is the
pattern of the demo model with the recommended setting of docs/caches.md: 35 of 50 steps skipped in each branch."""


def generate_seconds(
    omni: Omni,
    prompt: OmniPrompt,
    params: Sequence[OmniDiffusionSamplingParams],
    repeats: int = 1,
    warm_up_steps: int = WARM_UP_STEPS,
) -> tuple[Spread, dict[str, float]]:
    """Wall-clock seconds of one picture for each of `params`, all at once, and the last run's slowest timings.

    Pictures of the same sizes with fewer steps are the warm-up.
    """
    omni.generate([prompt] * len(params), [replace(p, num_inference_steps=warm_up_steps) for p in params])
    seconds = []
    for repeat in range(repeats):
        start = time.perf_counter()
        outputs = omni.generate([prompt] * len(params), [replace(p, seed=repeat) for p in params])
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds), max((o.timings for o in outputs), key=lambda timings: timings["total"])


def stages(timings: dict[str, float]) -> dict[str, float]:
    """Milliseconds by stage, for a row; `rest` is the engine's own time: queue, plans, transfer of the picture."""
    parts = {name: timings[name] for name in ("text_encode", "denoise", "vae_decode")}
    parts["rest"] = timings["total"] - sum(parts.values())
    return {f"{name} ms": 1e3 * seconds for name, seconds in parts.items()}


@dataclass(frozen=True)
class Started:
    """Started engine, and the seconds that its start took."""

    omni: Omni
    seconds: float

    @classmethod
    def of(cls, bench: Bench, name: str, **settings: Any) -> Self:
        bench.start_afresh()
        start = time.perf_counter()
        omni = bench.omni(name, **settings)
        return cls(omni, time.perf_counter() - start)

    def close(self) -> None:
        self.omni.close()

    def rows(self, label: str) -> list[Row]:
        ready = self.omni._async.ready
        assert ready is not None
        detail: dict[str, Any] = {
            "weights s": ready.load_seconds,
            "weights GB": ready.load_bytes / 1e9,
            "max_batch_tokens": ready.max_batch_tokens,
        }
        return [
            Row(f"{label}, cold start with random weights", self.seconds, "s", detail=detail),
            Row(f"{label}, peak memory after the warm-up", ready.peak_memory_bytes / 2**30, "GiB"),
        ]


def section_end_to_end(bench: Bench) -> Iterator[Case]:
    """Measure 1024x1024 pictures: Qwen-Image with guidance, Z-Image-Turbo, both also in fp8. Predicts denoising."""
    for name, count, repeats in PICTURES:
        steps = bench.steps(count)
        for fp8 in (False, True):
            label = f"{name}{', fp8' * fp8}"
            step = bench.predict(name, [bench.size(1024)], fp8=fp8)
            predicted = step and step * steps
            # A server's worker is a process of its own; an engine in this process starts faster.
            settings = {"quantization": "fp8", "distributed_executor_backend": "uni"} if fp8 else {}
            with Lazy(partial(Started.of, bench, name, **settings), Started.close) as engine:
                case = f"{label}, {steps} steps"
                draw = partial(_draw, bench, engine, name, label, steps, repeats, predicted)
                yield Case(case, draw, predicted)
                if name == "z-image" and not fp8:
                    yield Case(f"{name}, over HTTP", partial(_over_http, bench, engine, name))


def _draw(
    bench: Bench,
    engine: Lazy[Started],
    name: str,
    label: str,
    steps: int,
    repeats: int,
    predicted: float | None,
) -> list[Row]:
    started = engine.get()
    params = bench.params(name, bench.size(1024), steps)
    seconds, timings = generate_seconds(started.omni, bench.prompt(name), [params], repeats)
    row = Row.milliseconds(f"{label}, {steps} steps", seconds, predicted)
    per_step = 1e3 * timings["denoise"] / steps
    return [replace(row, detail={**row.detail, **stages(timings), "ms a step": per_step}), *started.rows(label)]


def _over_http(bench: Bench, engine: Lazy[Started], name: str) -> list[Row]:
    from benchmarks.gpu.http import over_http  # late: it needs the server's packages, which no other section needs

    return over_http(bench, engine.get().omni, name)


def forced_mask(steps: int) -> list[int]:
    """Mask of a cache by step: 1 computes, 0 skips."""
    cycle = [0] * RUN_OF_SKIPS + [1]
    return [1] * min(steps, COMPUTED_FIRST) + [cycle[i % len(cycle)] for i in range(steps - COMPUTED_FIRST)]


def forced_cache(steps: int) -> dict[str, Any]:
    """Engine settings for the forced pattern: with random weights steps differ, and a cache would skip none."""
    return {
        "cache_backend": "cache_dit",
        "cache_config": {
            **README_CACHE,
            "steps_computation_mask": forced_mask(steps),
            "steps_computation_policy": "static",
            "max_continuous_cached_steps": -1,
        },
    }


def forced_tea_cache() -> dict[str, Any]:
    """Engine settings that force TeaCache to skip regularly: its polynomial takes every change for 1, and the threshold
    is the number of steps. It always computes the first and the last step."""
    config = {"rel_l1_thresh": RUN_OF_SKIPS + 0.5, "coefficients": [1.0]}
    return {"cache_backend": "tea_cache", "cache_config": config}
