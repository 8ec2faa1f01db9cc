"""Section `video_layouts`: steps and decodes of videos on several GPUs against one.

The rank processes start once: each layout loads its model into them anew, without another start of Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.layouts import ONE, check_devices, name_of
from benchmarks.gpu.ranks import RankProcesses, listening_store
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.video_decode import TILED, WHOLE, decode_seconds
from benchmarks.gpu.video_step import (
    FRAMES,
    GUIDED,
    LARGE,
    QUICK,
    SHALLOW_LARGE,
    SIZES,
    SMALL,
    Shape,
    video_request,
    video_stepper,
)
from benchmarks.roofline.cards import wire_bytes
from benchmarks.timing import Spread, measure_long, release_memory
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.coordination.ranks import connect
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.startup.model_start import StartOptions
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.worker import RankInfo

LONG_GUIDED = Shape("720p", guided=True)
SHAPES = {SHALLOW_LARGE: (GUIDED, LONG_GUIDED), SMALL: (GUIDED,), LARGE: (GUIDED,)}
"""Model -> videos whose steps are measured in every layout."""
REPEATS = 2


def section_video_layouts(bench: Bench) -> Iterator[Case]:
    """Measure steps with guidance in each layout, then decodes. Predictions are floors, with no exchange hidden."""
    count = max((DiffusionParallelConfig(**degrees).world_size for degrees in bench.layouts), default=1)
    with Lazy(partial(_start, bench, count), RankProcesses.close) as ranks:
        for model, shapes in SHAPES.items():
            for degrees in ({}, *bench.layouts):
                steps = partial(_steps, bench, ranks, model, degrees, shapes)
                yield Case(f"{model}, {name_of(degrees)}", steps, _predicted(bench, model, shapes[0], degrees))
        for resolution in SIZES:
            case = f"decode of {resolution} {FRAMES} frames"
            yield Case(case, partial(_decodes, bench, ranks, case, bench.video(*SIZES[resolution], FRAMES), count))


def _start(bench: Bench, count: int) -> RankProcesses:
    check_devices(bench, count)
    return RankProcesses(count, bench.device.type, partial(_place, bench.device.type))


def _place(kind: str, rank: int) -> tuple[str, int]:
    return kind, rank


def _predicted(bench: Bench, model: str, shape: Shape, degrees: dict[str, int]) -> float | None:
    return bench.predict(model, [shape.size(bench)], DiffusionParallelConfig(**degrees))


def _steps(
    bench: Bench, ranks: Lazy[RankProcesses], model: str, degrees: dict[str, int], shapes: tuple[Shape, ...]
) -> list[Row]:
    parallel = DiffusionParallelConfig(**degrees)
    store = listening_store()
    sizes = [shape.size(bench) for shape in shapes]
    found = ranks.get().run(steps_on_rank, parallel, store.port, bench.model(model), sizes)
    rows = []
    for shape, size, *times in zip(shapes, sizes, *(its for its in found if its is not None)):
        seconds = max(times, key=lambda spread: spread.median)
        case, one = f"{model} {shape}, {name_of(degrees)}", _measured(bench, f"{model} {shape}, {ONE}")
        sent = wire_bytes(bench.cost(model, [size], parallel).exchanges, parallel)
        detail: dict[str, Any] = {"predicted MB sent": sum(sent.values()) / 1e6}
        if one and degrees:
            detail["speed-up"] = one / (1e3 * seconds.median)
        rows.append(Row.milliseconds(case, seconds, _predicted(bench, model, shape, degrees), **detail))
    return rows


def _measured(bench: Bench, case: str) -> float | None:
    return next((row.measured for row in bench.report.rows("video_layouts") if row.case == case), None)


def steps_on_rank(
    kind: str, rank: int, parallel: DiffusionParallelConfig, port: int, folder: str, sizes: list[Size]
) -> list[Spread] | None:
    """Seconds of guided steps of each size on this rank; None on a rank that the layout does not have."""
    if rank >= parallel.replica_size:
        return None
    # Steps of videos are too large for CUDA graphs, so the start need not capture any.
    config = OmniDiffusionConfig(
        model=folder, load_format="dummy", parallel=parallel, enforce_eager=True, progress_bar=False
    )
    place = RankInfo(rank=rank, replica_size=parallel.replica_size, store_port=port)
    info = load_model_info(folder, config.load_format)
    runner = ModelRunner(config, info, place, StartOptions(budget=QUICK))
    runner.start()
    device = Device(kind, rank).torch  # type: ignore[arg-type]  # a kind is a choice
    times = []
    for size in sizes:
        step = video_stepper(runner, video_request(size, guided=True))
        times.append(measure_long(step, device, budget=math.inf, most=REPEATS))  # all ranks repeat equally often
        del step
        release_memory(device)
    world = runner.ranks.world
    del runner
    release_memory(device)
    if world is not None:
        world.leave()
    return times


def _decodes(bench: Bench, ranks: Lazy[RankProcesses], case: str, size: Size, count: int) -> list[Row]:
    parallel = DiffusionParallelConfig(ulysses_degree=count, vae_patch_parallel_size=count)
    store = listening_store()
    found = ranks.get().run(decodes_on_rank, parallel, store.port, bench.model(SMALL), size)
    whole, shared = found[0][0], max((times[1] for times in found), key=lambda spread: spread.median)
    detail = {"over whole": whole.median / shared.median}
    return [
        Row(f"{case}, one rank, whole", whole.median, "s"),
        Row(f"{case}, {count} ranks, tiled", shared.median, "s", detail=detail),
    ]


def decodes_on_rank(
    kind: str, rank: int, parallel: DiffusionParallelConfig, port: int, folder: str, size: Size
) -> tuple[Spread, Spread]:
    """Seconds of a decode on this rank alone, and shared by all ranks."""
    device = Device(kind, rank)  # type: ignore[arg-type]  # a kind is a choice
    world = connect(parallel, RankInfo(rank=rank, replica_size=parallel.replica_size, store_port=port), device)
    whole = decode_seconds(folder, size, device.torch, WHOLE, DecodeGroup.alone(), budget=0.1)
    shared = decode_seconds(folder, size, device.torch, TILED, world.mesh.vae)
    world.leave()
    release_memory(device.torch)
    return whole, shared
