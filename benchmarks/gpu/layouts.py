"""Section `layouts`: a step over several GPUs against one, by size, with and without a step cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.engine import forced_cache
from benchmarks.gpu.report import Case, Row
from benchmarks.roofline.cards import wire_bytes
from benchmarks.timing import Spread
from vllm_omni import Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

MODEL = "qwen-image"
SIZES = (1024, 1536, 2048)
NUM_STEPS, REPEATS = 12, 2


def parse_layout(text: str) -> dict[str, int]:
    """`ulysses=2,cfg=2` -> degrees by field. Raises ValueError with the names that are taken."""
    names = {f.name.split("_")[0]: f.name for f in fields(DiffusionParallelConfig)[:5]}
    layout = {}
    for part in text.split(","):
        name, _, degree = part.partition("=")
        if name not in names or not degree.isdigit():
            raise ValueError(f"a layout is NAME=DEGREE,... of {', '.join(names)}, got {text!r}")
        layout[names[name]] = int(degree)
    return layout


def name_of(layout: dict[str, int]) -> str:
    return " x ".join(f"{axis.split('_')[0]} {degree}" for axis, degree in layout.items()) or "one device"


def section_layouts(bench: Bench) -> Iterator[Case]:
    sizes = [bench.size(side) for side in (SIZES[:1] if bench.tiny else SIZES)]
    for layout in ({}, *bench.layouts):
        parallel = DiffusionParallelConfig(**layout)
        world = parallel.world_size
        with Lazy(lambda p=parallel: _omni(bench, p), Omni.close) as omni:  # type: ignore[misc]  # p
            for size in sizes:
                for cached in (False, True):
                    case = f"{name_of(layout)}, {size[1]}x{size[0]}{', cached' if cached else ''}"
                    predicted = None if cached else bench.predict(MODEL, [size], parallel)

                    def run(
                        omni: Any = omni,
                        case: str = case,
                        size: Size = size,
                        cached: bool = cached,
                        predicted: float | None = predicted,
                        parallel: DiffusionParallelConfig = parallel,
                        world: int = world,
                    ) -> list[Row]:
                        seconds, skipped = _step_seconds(bench, omni.get(), size, cached)
                        row = Row.milliseconds(case, seconds, predicted)
                        detail = {**row.detail, **_against_one(bench, size, cached, seconds, world)}
                        sent = wire_bytes(bench.cost(MODEL, [size], parallel).exchanges, parallel)
                        detail["cached steps"] = skipped
                        detail["predicted MB sent"] = sum(sent.values()) / 1e6
                        return [replace(row, detail=detail)]

                    yield Case(case, run, predicted)


def _omni(bench: Bench, parallel: DiffusionParallelConfig) -> Omni:
    if bench.device.type == "cuda" and parallel.world_size > (count := torch.cuda.device_count()):
        raise ConfigError(f"needs {parallel.world_size} GPUs, this machine has {count}")
    return bench.omni(MODEL, parallel_config=parallel, **forced_cache(NUM_STEPS))


def _step_seconds(bench: Bench, omni: Omni, size: Size, cached: bool) -> tuple[Spread, float]:
    """Of a step, the mean over a picture's steps, and how many of them were skipped; the first picture warms up."""
    params = bench.params(MODEL, size, NUM_STEPS, cache=cached)
    outputs = [omni.generate(bench.prompt(MODEL), params)[0] for _ in range(REPEATS + 1)]
    seconds = Spread.of([output.timings["denoise"] / NUM_STEPS for output in outputs[1:]])
    return seconds, outputs[-1].timings["cached_steps"]


def _against_one(bench: Bench, size: Size, cached: bool, seconds: Spread, world: int) -> dict[str, float]:
    """Speed-up and efficiency over the row of one device, where it is there."""
    wanted = f"{name_of({})}, {size[1]}x{size[0]}{', cached' if cached else ''}"
    one = next((row.measured for row in bench.report.rows("layouts") if row.case == wanted), None)
    if one is None:
        return {}
    gain = one / (1e3 * seconds.median)
    return {"speed-up": gain, "efficiency": gain / world}
