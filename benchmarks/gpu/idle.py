"""Section `idle`: what is not arithmetic: gaps on the device, files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import started_runner, stepper
from benchmarks.timing import measure
from vllm_omni.entrypoints.openai.png import png

NUM_STEPS = 5
GRAIN = 20
"""Of the picture that is encoded: as noisy as a photograph."""


def section_idle(bench: Bench) -> Iterator[Case]:
    yield Case("device gaps", lambda: _gaps(bench))
    yield Case("png", lambda: _png(bench))


@torch.inference_mode()
def _gaps(bench: Bench) -> list[Row]:
    """Of the time of some steps one after another, that in which the device ran no kernel."""
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
    """From the first start to the last end; how much of it lies in a span; the longest gap."""
    ordered = sorted(spans)
    first, reach = ordered[0]
    busy, longest = reach - first, 0.0
    for start, end in ordered[1:]:
        longest = max(longest, start - reach)
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return reach - first, busy, longest


def _png(bench: Bench) -> list[Row]:
    """As the server encodes, and as Pillow does with zlib's level 1."""
    height, width = bench.size(1024)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack((x * 255 / width, y * 255 / height, (x + y) * 127 / width), axis=-1)
    noise = np.random.default_rng(0).normal(0, GRAIN, smooth.shape)
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)

    def pillow() -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()

    ways: dict[str, Callable[[], bytes]] = {"ours": lambda: png(pixels), "Pillow": pillow}
    return [
        Row.milliseconds(f"PNG of {width}x{height}, {name}", measure(write, torch.device("cpu")), MB=len(write()) / 1e6)
        for name, write in ways.items()
    ]
