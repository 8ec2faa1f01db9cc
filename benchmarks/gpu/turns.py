"""Cases of section `memory`: pictures with components in turns, on the memory that a smaller card has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Lazy
from benchmarks.gpu.engine import Started, stages
from benchmarks.gpu.report import Case, Row
from benchmarks.timing import Spread

PICTURES = (("qwen-image", 20, False, 48), ("qwen-image", 20, True, 24), ("z-image", 9, False, 16))
"""(model, steps, whether in fp8, GiB of the card)."""
QUEUED = (1, 8)
REPEATS = 2


def turn_cases(bench: Bench) -> Iterator[Case]:
    """Measure one and eight queued 1024x1024 pictures. Predicts denoising, and the copies of one turn of each phase."""
    for name, count, fp8, gib in PICTURES:
        steps = bench.steps(count)
        quantization = {"quantization": "fp8"} if fp8 else {}
        share = _share_of(bench.device, gib)
        start = partial(Started.of, bench, name, enable_cpu_offload=True, gpu_memory_utilization=share, **quantization)
        with Lazy(start, Started.close) as engine:
            for queued in QUEUED:
                case = f"{name}{', fp8' * fp8}, turns in {gib} GiB, {queued} queued, {steps} steps"
                yield Case(case, partial(_draw, bench, engine, name, case, steps, queued, fp8))


def _share_of(device: torch.device, gib: int) -> float:
    """Share of the device's memory that a card of so many GiB has."""
    if device.type == "cpu":
        return 1.0
    return min(1.0, gib * 2**30 / torch.cuda.get_device_properties(device).total_memory)


def _draw(bench: Bench, engine: Lazy[Started], name: str, case: str, steps: int, queued: int, fp8: bool) -> list[Row]:
    started = engine.get()
    ready = started.omni._async.ready
    assert ready is not None
    size = bench.size(1024)
    params = [bench.params(name, size, steps)] * queued
    prompt, seconds = bench.prompt(name), []
    for repeat in range(1 + REPEATS):  # the first is the warm-up; a repeated prompt would need no text encoder
        prompts = [replace(prompt, prompt=f"{prompt.prompt}, {repeat} {number}") for number in range(queued)]
        begin = time.perf_counter()
        outputs = started.omni.generate(prompts, params)
        seconds.append(time.perf_counter() - begin)
    copies = 1e3 * (ready.encode_turn_seconds + ready.decode_turn_seconds)
    step = bench.predict(name, [size], fp8=fp8)
    row = Row.milliseconds(
        case,
        Spread.of(seconds[1:]),
        step and queued * steps * step + copies,
        **{"copies ms": copies, "peak GiB": ready.peak_memory_bytes / 2**30},
        **stages(max((output.timings for output in outputs), key=lambda timings: timings["total"])),
    )
    return [row]
