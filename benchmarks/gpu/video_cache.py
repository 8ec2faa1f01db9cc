"""Section `video_cache`: 50 guided steps of a video with TeaCache forced to skip, and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engine import RUN_OF_SKIPS, forced_tea_cache
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import started_runner
from benchmarks.gpu.video_step import QUICK, SMALL, Shape, video_request
from benchmarks.timing import measure_long
from vllm_omni.diffusion.compute.worker.runner import ModelRunner

STEPS = 50
WARM_UP_STEPS = RUN_OF_SKIPS + 3
SHAPE = Shape("480p", guided=True)


def section_video_cache(bench: Bench) -> Iterator[Case]:
    """Measure the denoising of one video of Wan 1.3B."""
    step, steps = bench.predict(SMALL, [SHAPE.size(bench)], guided=True), bench.steps(STEPS)
    computed = 2 + (steps - 2) / (RUN_OF_SKIPS + 1)
    for name, settings, count in (("no cache", {}, steps), ("TeaCache, forced", forced_tea_cache(), computed)):
        case = f"{SMALL} {SHAPE}, {steps} steps, {name}"
        predicted = step and count * step
        yield Case(case, partial(_measure, bench, case, settings, predicted), predicted)


@torch.inference_mode()
def _measure(bench: Bench, case: str, settings: dict[str, object], predicted: float | None) -> list[Row]:
    runner = started_runner(bench, settings, SMALL, budget=QUICK)
    reused = 0

    def run() -> None:
        nonlocal reused
        reused = _denoise(bench, runner, bench.steps(STEPS))

    _denoise(bench, runner, WARM_UP_STEPS)
    seconds = measure_long(run, bench.device, warm_ups=0, budget=0)
    return [Row.milliseconds(case, seconds, predicted, **{"cached steps": reused / 2})]


def _denoise(bench: Bench, runner: ModelRunner, steps: int) -> int:
    """Denoise a video. Returns how many branches reused blocks, over all steps."""
    pipeline = runner.pipeline
    request = video_request(SHAPE.size(bench), guided=True, steps=steps)
    state = pipeline.encode(replace(request, cache=True))
    reused = 0
    for _ in range(steps):
        (branches,) = pipeline.predict([state])
        pipeline.advance(state, branches)
        reused += state.settle()
    pipeline.forget(state)
    return reused
