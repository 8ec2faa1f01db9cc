"""Section `step`: one denoising step of Qwen-Image (guided) and Z-Image-Turbo, with our and diffusers' code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Lazy, Size
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.theirs import StepOf, start_diffusers
from benchmarks.published import UNGUIDED
from benchmarks.timing import measure
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.attention import BACKENDS
from vllm_omni.diffusion.compute.startup.model_start import StartOptions
from vllm_omni.diffusion.compute.startup.warmup import StepBudget
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

MODEL, Z_IMAGE = "qwen-image", "z-image"
NUM_STEPS = 100
"""Steps of the timed request; more than the number of repeats."""
WARM_UPS = 4
BUDGET_SECONDS = 2.5


@dataclass(frozen=True)
class Variant:
    settings: dict[str, Any] = field(default_factory=dict)
    compiled: bool | None = None
    """Whether blocks are compiled; None: the default of the settings."""


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "fused, eager": Variant({"enforce_eager": True}),
    "fused, compiled": Variant({}, compiled=True),
    "torch, eager": Variant({"kernels": "torch", "enforce_eager": True}),
    "torch, compiled": Variant({"kernels": "torch"}, compiled=True),
    "fp8": Variant({"quantization": "fp8"}),
    "fp8, fused, eager": Variant({"quantization": "fp8", "enforce_eager": True}),
    "fp8, torch, compiled": Variant({"quantization": "fp8", "kernels": "torch"}, compiled=True),
}
"""Variants by implementation of the elementwise operations (`fused`: Triton). All but eager use CUDA graphs."""
SMALL = (256, 512, 1024)
"""Sides of pictures at which launching kernel by kernel may be slower than the device."""


@dataclass(frozen=True)
class Contender:
    model: str
    name: str
    start: Callable[[], StepOf]
    sides: tuple[int, ...] = (1024,)
    """Sides of the square pictures, in pixels."""


def contenders(bench: Bench) -> Iterator[Contender]:
    """Contenders, the most important first."""
    sides = {MODEL: (1024, 512, 256, 2048), Z_IMAGE: (1024, 512, 256)}
    small = {"fused, eager": SMALL}
    for model in (MODEL, Z_IMAGE):
        ours = {name: partial(start_ours, bench, variant, model) for name, variant in VARIANTS.items()}
        yield Contender(model, "default", ours.pop("default"), sides[model])
        yield Contender(model, "diffusers, eager", partial(start_diffusers, bench, model, False), sides[model])
        yield Contender(model, "diffusers, compiled", partial(start_diffusers, bench, model, True))
        for name, start in ours.items():
            yield Contender(model, name, start, small.get(name, (1024,)))
    for backend in BACKENDS:
        variant = Variant({"attention_backend": backend})
        yield Contender(MODEL, f"attention {backend}", partial(start_ours, bench, variant))


def section_step(bench: Bench) -> Iterator[Case]:
    for contender in contenders(bench):
        with Lazy(contender.start, lambda _: None) as step_of:
            for side in contender.sides:
                size, case = bench.size(side), f"{contender.model} {side}, {contender.name}"
                predicted = bench.predict(contender.model, [size], fp8="fp8" in contender.name)
                rows = partial(_measure, bench, case, contender.model, step_of, size, predicted)
                yield Case(case, rows, predicted)


@torch.inference_mode()
def _measure(
    bench: Bench, case: str, model: str, step_of: Lazy[StepOf], size: Size, predicted: float | None
) -> list[Row]:
    step = step_of.get()(size)
    seconds = measure(step, bench.device, warm_ups=WARM_UPS, budget=0.2 if bench.tiny else BUDGET_SECONDS)
    rate = bench.cost(model, [size]).flops / seconds.median
    detail: dict[str, Any] = {"TFLOP/s": rate / 1e12, "peak GiB": peak_memory(bench.device) / 2**30}
    if (card := bench.card) is not None:
        detail["of the measured bf16 rate"] = rate / card.bf16_flops
    return [Row.milliseconds(case, seconds, predicted, **detail)]


def start_ours(bench: Bench, variant: Variant, model: str = MODEL) -> StepOf:
    # Also where compiling gains nothing, to show that; not on a CPU, where it takes long.
    compile_blocks = True if variant.compiled and bench.device.type == "cuda" else None
    runner = started_runner(bench, variant.settings, model, compile_blocks)
    return lambda size: stepper(bench, runner, size, model)


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def request_of(bench: Bench, size: Size, model: str = MODEL, steps: int = NUM_STEPS) -> DiffusionRequest:
    prompt = bench.prompt(model)
    return DiffusionRequest(
        request_id="step",
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        true_cfg_scale=1.0 if model in UNGUIDED else 4.0,
        seed=1,
        max_sequence_length=512,
    )


def started_runner(
    bench: Bench,
    settings: dict[str, Any],
    model: str = MODEL,
    compile_blocks: bool | None = None,
    budget: StepBudget = StepBudget(),  # noqa: B008 - frozen
) -> ModelRunner:
    """Runner after its warm-up. budget: limits of what it measures of its own steps."""
    bench.start_afresh()
    config = OmniDiffusionConfig(model=bench.model(model), load_format="dummy", **settings)
    info = load_model_info(config.model, config.load_format)
    info.check_settings(config)
    runner = ModelRunner(config, info, options=StartOptions(compile_blocks=compile_blocks, budget=budget))
    runner.start()
    return runner


def stepper(bench: Bench, runner: ModelRunner, size: Size, model: str = MODEL) -> Any:
    """Function that runs the next step of a request: predict, combine the branches, advance."""
    pipeline = runner.pipeline
    state = pipeline.encode(request_of(bench, size, model))

    def step() -> None:
        (branches,) = pipeline.predict([state])
        pipeline.advance(state, branches)
        state.settle()

    return step
