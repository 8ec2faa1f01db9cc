"""Sections `video_step` and `video_further`: a denoising step of Wan at 480p and 720p, by our and diffusers' code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.models import SHALLOW
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.step import peak_memory, started_runner
from benchmarks.gpu.theirs import start_diffusers
from benchmarks.roofline.cards import floor_of
from benchmarks.timing import measure_long
from vllm_omni.diffusion.compute.startup.warmup import StepBudget
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.messages.placement import balance
from vllm_omni.diffusion.messages.request import DiffusionRequest

SMALL, LARGE = "wan-1.3b", "wan-14b"
SHALLOW_LARGE = LARGE + SHALLOW
FRAMES, FEW_FRAMES = 81, 17
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
"""Height and width in pixels of the published resolutions."""
BUDGET_SECONDS = 6.0
NUM_STEPS = 50
QUICK = StepBudget(gpu_seconds=0.0, min_samples=1)
"""Measure one size of step at start: the section measures its own."""
FP8 = {"quantization": "fp8"}

StepOf = Callable[[Size, bool], Callable[[], object]]
"""Function of a loaded model: takes a size and whether there is guidance, returns a function that runs one step."""


@dataclass(frozen=True)
class Shape:
    """A video to measure a step of."""

    resolution: str
    frames: int = FRAMES
    guided: bool = False
    """Two branches, or one."""

    def size(self, bench: Bench) -> Size:
        return bench.video(*SIZES[self.resolution], self.frames)

    def __str__(self) -> str:
        return f"{self.resolution} {self.frames} frames, {'guidance' if self.guided else 'one branch'}"


GUIDED, SINGLE, LONG = Shape("480p", guided=True), Shape("480p"), Shape("720p")
SHORT, PICTURE = Shape("480p", FEW_FRAMES), Shape("480p", 1)


@dataclass(frozen=True)
class Contender:
    model: str
    name: str
    start: Callable[[], StepOf]
    shapes: tuple[Shape, ...]


def section_video_step(bench: Bench) -> Iterator[Case]:
    """Measure the large model: whole, then a fifth of its blocks against diffusers' and in fp8."""
    ours, theirs = partial(_start_ours, bench), partial(_start_theirs, bench)
    yield from _cases(
        bench,
        Contender(LARGE, "default", partial(ours, {}, LARGE), (GUIDED,)),
        Contender(SHALLOW_LARGE, "default", partial(ours, {}, SHALLOW_LARGE), (SINGLE, LONG, SHORT)),
        Contender(SHALLOW_LARGE, "diffusers, compiled", partial(theirs, True, SHALLOW_LARGE), (SINGLE, LONG)),
        Contender(SHALLOW_LARGE, "fp8", partial(ours, FP8, SHALLOW_LARGE), (SINGLE, LONG, SHORT)),
        Contender(SHALLOW_LARGE, "diffusers, eager", partial(theirs, False, SHALLOW_LARGE), (SINGLE, LONG, SHORT)),
    )


def section_video_further(bench: Bench) -> Iterator[Case]:
    """Measure the small model, and the whole large one at 720p."""
    ours, theirs = partial(_start_ours, bench), partial(_start_theirs, bench)
    yield from _cases(
        bench,
        Contender(SMALL, "default", partial(ours, {}, SMALL), (GUIDED, SINGLE, LONG, SHORT, PICTURE)),
        Contender(SMALL, "diffusers, eager", partial(theirs, False, SMALL), (SINGLE, LONG, SHORT, PICTURE)),
        Contender(LARGE, "default", partial(ours, {}, LARGE), (SINGLE, LONG)),
        Contender(LARGE, "diffusers, eager", partial(theirs, False, LARGE), (SINGLE,)),
        Contender(LARGE, "diffusers, compiled", partial(theirs, True, LARGE), (SINGLE,)),
        Contender(SMALL, "diffusers, compiled", partial(theirs, True, SMALL), (SINGLE, LONG)),
        Contender(SMALL, "fp8", partial(ours, FP8, SMALL), (SINGLE, SHORT)),
    )


def _cases(bench: Bench, *contenders: Contender) -> Iterator[Case]:
    """Cases in order. A guided step of diffusers is two of its forwards: its cases have one branch."""
    for contender in contenders:
        with Lazy(contender.start, lambda _: None) as step_of:
            for shape in contender.shapes:
                case = f"{contender.model} {shape}, {contender.name}"
                fp8 = contender.name == "fp8"
                predicted = bench.predict(contender.model, [shape.size(bench)], fp8=fp8, guided=shape.guided)
                yield Case(case, partial(_measure, bench, case, contender.model, step_of, shape, predicted), predicted)


@torch.inference_mode()
def _measure(
    bench: Bench, case: str, model: str, step_of: Lazy[StepOf], shape: Shape, predicted: float | None
) -> list[Row]:
    size = shape.size(bench)
    step = step_of.get()(size, shape.guided)
    seconds = measure_long(step, bench.device, budget=0.1 if bench.tiny else BUDGET_SECONDS)
    cost = bench.cost(model, [size], guided=shape.guided)
    detail: dict[str, Any] = {
        "TFLOP/s": cost.flops / seconds.median / 1e12,
        "attention % of FLOPs": 100 * cost.attention_flops / cost.flops,
        "peak GiB": peak_memory(bench.device) / 2**30,
    }
    if (card := bench.card_for(model)) is not None:
        floor = floor_of(cost, card)
        detail["of the measured bf16 rate"] = cost.flops / seconds.median / card.bf16_flops
        detail |= {"products ms": 1e3 * floor.gemms, "attention ms": 1e3 * floor.attention}
    return [Row.milliseconds(case, seconds, predicted, **detail)]


def _start_ours(bench: Bench, settings: dict[str, Any], model: str) -> StepOf:
    runner = started_runner(bench, settings, model, budget=QUICK)
    return lambda size, guided: video_stepper(runner, video_request(size, guided))


def _start_theirs(bench: Bench, compiled: bool, model: str) -> StepOf:
    step_of = start_diffusers(bench, model, compiled)
    return lambda size, guided: step_of(size)


def video_request(size: Size, guided: bool, steps: int = NUM_STEPS) -> DiffusionRequest:
    return DiffusionRequest(
        request_id="video",
        prompt="a photo of a red apple and a blue car on a wooden table",
        negative_prompt=" " if guided else None,
        height=size[0],
        width=size[1],
        num_frames=size[2],
        num_inference_steps=steps,
        true_cfg_scale=4.0 if guided else 1.0,
        seed=1,
        max_sequence_length=512,
    )


def video_stepper(runner: ModelRunner, request: DiffusionRequest) -> Callable[[], object]:
    """Function that runs the next step of a request, on every rank of the replica."""
    pipeline = runner.pipeline
    state = pipeline.encode(request)
    groups = balance({request.request_id: state.sequence_lengths}, runner.ranks.mesh.cfg_size)[request.request_id]

    def step() -> None:
        (branches,) = pipeline.predict([state], groups)
        pipeline.advance(state, branches)
        state.settle()

    return step
