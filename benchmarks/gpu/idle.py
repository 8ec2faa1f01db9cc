"""Section `idle`: time outside of arithmetic: gaps between kernels, work of the host, PNG files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import started_runner, stepper
from benchmarks.timing import Spread, measure

NUM_STEPS, WARM_UPS = 5, 3
HOST_SIDES = (1024, 512, 256)
GRAIN = 20
"""Noise of the picture to encode, in levels: as much as in a photograph."""


def section_idle(bench: Bench) -> Iterator[Case]:
    yield Case("device gaps", lambda: _gaps(bench))
    yield Case("host", lambda: _host(bench))
    yield Case("png", lambda: _png(bench))


@torch.inference_mode()
def _gaps(bench: Bench) -> list[Row]:
    """Measure the time in consecutive steps in which the device runs no kernel."""
    case = "device idle within steps"
    if bench.device.type != "cuda":
        return [Row(case, refused="needs a GPU")]
    step = stepper(bench, started_runner(bench, {}), bench.size(1024))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_STEPS):
            step()
        torch.cuda.synchronize()
    events = profiler.events() or []
    spans = [(e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA"]
    span, busy, longest = covered(spans)
    detail = {"steps": NUM_STEPS, "kernels": len(spans), "busy ms": busy / 1e3, "longest gap ms": longest / 1e3}
    return [Row(case, 100 * (1 - busy / span), "%", detail=detail)]


def covered(spans: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(total time from the first start to the last end, time covered by spans, longest gap)."""
    ordered = sorted(spans)
    first, reach = ordered[0]
    busy, longest = reach - first, 0.0
    for start, end in ordered[1:]:
        longest = max(longest, start - reach)
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return reach - first, busy, longest


@torch.inference_mode()
def _host(bench: Bench) -> list[Row]:
    """Measure the time until the host has launched a step, and until the device has finished it."""
    step_of = partial(stepper, bench, started_runner(bench, {}))
    rows = []
    for side in HOST_SIDES:
        size = bench.size(side)
        step = step_of(size)
        sent, done = [], []
        for _ in range(WARM_UPS + NUM_STEPS):
            _wait(bench.device)
            start = time.perf_counter()
            step()
            sent.append(time.perf_counter() - start)
            _wait(bench.device)
            done.append(time.perf_counter() - start)
        detail = {"until it is done, ms": 1e3 * Spread.of(done[WARM_UPS:]).median}
        rows.append(Row.milliseconds(f"sending a step of {size[1]}x{size[0]}", Spread.of(sent[WARM_UPS:]), **detail))
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _png(bench: Bench) -> list[Row]:
    """Measure the time of a PNG by the server's encoder."""
    from vllm_omni.entrypoints.openai.responses.png import (
        encode_png,
    )  # late: it needs isal, which no other section needs

    height, width = bench.size(1024)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack((x * 255 / width, y * 255 / height, (x + y) * 127 / width), axis=-1)
    noise = np.random.default_rng(0).normal(0, GRAIN, smooth.shape)
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    seconds = measure(lambda: encode_png(pixels), torch.device("cpu"))
    return [Row.milliseconds(f"PNG of {width}x{height}", seconds, MB=len(encode_png(pixels)) / 1e6)]
