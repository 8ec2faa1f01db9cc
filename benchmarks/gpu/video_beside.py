"""Section `video_beside`: the latency of a picture beside a running video, against the same picture alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

from benchmarks.gpu.bench import Bench, Size
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.video_step import LONG, PICTURE, SMALL
from benchmarks.timing import Spread
from vllm_omni import AsyncOmni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

PICTURE_STEPS, REPEATS = 10, 2
VIDEO_STEPS = 60
"""More than pass while the pictures are made; then the video is stopped."""
WARM_UPS = 3
"""Pictures after which CUDA graphs of their steps are captured."""


def section_video_beside(bench: Bench) -> Iterator[Case]:
    """Send a picture just after a step of the video. Prediction: its own steps, for the one beside a video also the
    step of the video that has just begun."""
    own = bench.predict(SMALL, [PICTURE.size(bench)])
    yield Case(SMALL, partial(_measure, bench, own and own * PICTURE_STEPS), own and own * PICTURE_STEPS)


def _measure(bench: Bench, own: float | None) -> list[Row]:
    alone, beside, steps = asyncio.run(_latencies(bench))
    step = bench.predict(SMALL, [LONG.size(bench)])
    name = f"picture of {PICTURE_STEPS} steps"
    detail = {
        "over alone ms": 1e3 * (beside.median - alone.median),
        "the video's step with the pictures ms": 1e3 * steps.median,
    }
    return [
        Row.milliseconds(f"{name}, alone", alone, own),
        Row.milliseconds(f"{name}, beside a video of 720p", beside, own and step and own + step, **detail),
    ]


async def _latencies(bench: Bench) -> tuple[Spread, Spread, Spread]:
    """Seconds of a picture alone, of one beside a video, and of the video's steps meanwhile."""
    omni = AsyncOmni(
        model=bench.model(SMALL),
        load_format="dummy",
        distributed_executor_backend="uni",
        enforce_eager=bench.enforce_eager,
        progress_bar=False,
    )
    alone: list[float] = []
    beside: list[float] = []
    ends: list[float] = []
    try:
        await omni.start()
        for _ in range(WARM_UPS + REPEATS):
            alone.append(await _latency(bench, omni))
        video = omni.generate(bench.prompt(SMALL), _params(bench, LONG.size(bench), VIDEO_STEPS))
        async for output in video:
            if output.step > len(ends):
                ends.append(time.perf_counter())
                beside.append(await _latency(bench, omni))
            if len(ends) > REPEATS:
                break
        await video.aclose()
        if len(ends) <= REPEATS:
            raise RuntimeError(f"the video ended after {len(ends)} pictures of {REPEATS + 1}")
    finally:
        await omni.close()
    # The first step of the video may compile kernels.
    return Spread.of(alone[WARM_UPS:]), Spread.of(beside[1:]), Spread.of([b - a for a, b in pairwise(ends)])


async def _latency(bench: Bench, omni: AsyncOmni) -> float:
    start = time.perf_counter()
    async for _ in omni.generate(bench.prompt(SMALL), _params(bench, PICTURE.size(bench), PICTURE_STEPS)):
        pass
    return time.perf_counter() - start


def _params(bench: Bench, size: Size, steps: int) -> OmniDiffusionSamplingParams:
    height, width, frames = size
    changes = {"num_frames": frames, "true_cfg_scale": None, "guidance_scale": 4.0}
    return bench.params(SMALL, (height, width), steps, **changes)
