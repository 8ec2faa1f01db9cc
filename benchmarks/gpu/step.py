"""Section `step`: one denoising step of Qwen-Image (guided, against diffusers' transformer) and of Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel

from benchmarks.gpu.bench import Bench, Size
from benchmarks.gpu.report import Case, Row
from benchmarks.published import UNGUIDED
from benchmarks.timing import Spread, measure
from vllm_omni.diffusion.attention import BACKENDS
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.loading import load_weights
from vllm_omni.diffusion.registry import load_model_info
from vllm_omni.diffusion.request import DiffusionRequest, RequestCost
from vllm_omni.diffusion.sampling import combine_guidance
from vllm_omni.diffusion.worker.runner import ModelRunner

MODEL, Z_IMAGE = "qwen-image", "z-image"
NUM_STEPS = 100
"""Of the request whose steps are timed; more than are repeated."""
WARM_UPS = 3
BUDGET_SECONDS = 4.0


def variants() -> dict[str, dict[str, Any]]:
    """Name -> settings, of those that this version has."""
    found: dict[str, dict[str, Any]] = {
        "eager": {"enforce_eager": True},
        "compiled": {},
        "compiled, fp8": {"quantization": "fp8"},
        "eager, kernels of PyTorch": {"kernels": "torch", "enforce_eager": True},
        "compiled, kernels of PyTorch": {"kernels": "torch"},
        "eager, fp8": {"quantization": "fp8", "enforce_eager": True},
    }
    return found | {f"attention {backend}": {"attention_backend": backend} for backend in BACKENDS}


Z_IMAGE_VARIANTS = ("eager", "compiled", "compiled, kernels of PyTorch", "compiled, fp8")


@dataclass(frozen=True)
class Contender:
    name: str
    model: str
    run: Callable[[], tuple[Spread, int]]
    """-> seconds of a step, and the most bytes held."""


def contenders(bench: Bench, size: Size) -> Iterator[Contender]:
    for compiled in (False, True):
        name = f"diffusers, {'compiled' if compiled else 'eager'}"
        yield Contender(name, MODEL, partial(time_diffusers, bench, size, compiled))
    for name in Z_IMAGE_VARIANTS:
        yield Contender(f"Z-Image, {name}", Z_IMAGE, partial(time_ours, bench, size, name, Z_IMAGE))
    for name in variants():
        yield Contender(f"ours, {name}", MODEL, partial(time_ours, bench, size, name))


def section_step(bench: Bench) -> Iterator[Case]:
    size = bench.size(1024)
    for contender in contenders(bench, size):
        predicted = bench.predict(contender.model, [size], fp8="fp8" in contender.name)

        def rows(contender: Contender = contender, predicted: float | None = predicted) -> list[Row]:
            seconds, peak = contender.run()
            rate = bench.cost(contender.model, [size]).flops / seconds.median
            detail: dict[str, Any] = {"TFLOP/s": rate / 1e12, "peak GiB": peak / 2**30}
            if (card := bench.card) is not None:
                detail["of the measured bf16 rate"] = rate / card.bf16_flops
            return [Row.milliseconds(contender.name, seconds, predicted, **detail)]

        yield Case(contender.name, rows, predicted)


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def request_of(bench: Bench, size: Size, model: str = MODEL, steps: int = NUM_STEPS) -> DiffusionRequest:
    prompt, info = bench.prompt(model), bench.info(model)
    return DiffusionRequest(
        request_id="step",
        prompt=prompt.prompt,
        negative_prompt=prompt.negative_prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        true_cfg_scale=1.0 if model in UNGUIDED else 4.0,
        guidance_scale=None,
        seed=1,
        max_sequence_length=512,
        sigmas=None,
        priority=0,
        preview_steps=(),
        cost=RequestCost(0, 0, 0, ()),
        num_prompt_tokens=info.count_prompt_tokens(prompt.prompt),
        num_image_tokens=info.num_image_tokens(*size),
        cache=False,
        arrival=0.0,
    )


def started_runner(
    bench: Bench, settings: dict[str, Any], model: str = MODEL, compile_blocks: bool | None = None
) -> ModelRunner:
    config = OmniDiffusionConfig(model=bench.model(model), load_format="dummy", **settings)
    info = load_model_info(config.model, config.load_format)
    info.check_settings(config)
    runner = ModelRunner(config, info, compile_blocks=compile_blocks)
    runner.start()
    return runner


def stepper(bench: Bench, runner: ModelRunner, size: Size, model: str = MODEL) -> Any:
    """A function that makes the next step of a request: predict, combine the branches, advance."""
    pipeline = runner.pipeline
    state = pipeline.encode(request_of(bench, size, model))

    def step() -> None:
        (branches,) = pipeline.predict([state])
        pipeline.advance(state, pipeline.combine(state, branches))
        state.settle()

    return step


@torch.inference_mode()
def time_ours(bench: Bench, size: Size, name: str, model: str = MODEL) -> tuple[Spread, int]:
    # Also where it is no gain, which is what is to be seen; on a CPU it would only take long.
    compile_blocks = True if name.startswith("compiled") and bench.device.type == "cuda" else None
    runner = started_runner(bench, variants()[name], model, compile_blocks)
    step = stepper(bench, runner, size, model)
    seconds = measure(step, bench.device, warm_ups=WARM_UPS, budget=0.2 if bench.tiny else BUDGET_SECONDS)
    return seconds, peak_memory(bench.device)


@torch.inference_mode()
def time_diffusers(bench: Bench, size: Size, compiled: bool) -> tuple[Spread, int]:
    """As its pipeline steps: a forward for each branch, which are then combined."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    folder = Path(bench.model(MODEL)) / "transformer"
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel.from_config(QwenImageTransformer2DModel.load_config(folder))
    # Named as in the checkpoint, so the weights are the same as ours.
    load_weights(transformer, folder, {}, bench.device, dtype, load_format="dummy")
    if compiled and bench.device.type == "cuda":
        transformer.compile_repeated_blocks()
    (branches,) = bench.branches(MODEL, [size])
    width = transformer.config.joint_attention_dim
    grid = [[(1, size[0] // 16, size[1] // 16)]]
    latents = torch.randn(1, branches[0].image, transformer.config.in_channels, device=bench.device, dtype=dtype)
    texts = [torch.randn(1, branch.text, width, device=bench.device, dtype=dtype) for branch in branches]
    timestep = torch.full((1,), 0.5, device=bench.device, dtype=dtype)

    def step() -> None:
        positive, negative = (
            transformer(
                hidden_states=latents,
                timestep=timestep,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None,
                img_shapes=grid,
                return_dict=False,
            )[0]
            for text in texts
        )
        combine_guidance(positive, negative, 4.0)

    seconds = measure(step, bench.device, warm_ups=WARM_UPS, budget=0.2 if bench.tiny else BUDGET_SECONDS)
    return seconds, peak_memory(bench.device)
